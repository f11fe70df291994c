"""Packed towers whose hosts lack something, or call them in another way: refused by name, and nothing is changed."""

from __future__ import annotations

import sys

import pytest
import torch
from families.build import FAMILIES, shared
from families.packed_by_hand import PACKED, at_tokens, attention_of, blocks_of, encode
from families.test_token_signals import Listen, token_first
from support.checks import assert_equal, assert_same
from torch import nn
from vlmtok.adapters.language.families import ROWS

import vlmtok
from vlmtok.errors import HostChanged, SiteError

pytestmark = pytest.mark.filterwarnings("ignore:the hooks of")

METHODS = ("visionzip", "prumerge", "scope")


def hooks_of(model: nn.Module) -> int:
    """Hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_refused(model: nn.Module, why: str) -> None:
    """Methods that read the tower's attention are refused with the reason, others run; the model is as it was."""
    before = hooks_of(model)
    for method in METHODS:
        with pytest.raises(SiteError, match=why):
            vlmtok.compress(model, method)
    assert hooks_of(model) == before
    vlmtok.compress(model, "random:keep=0.5").remove()
    assert hooks_of(model) == before


@pytest.mark.parametrize("name", PACKED)
def test_a_host_without_its_rotary_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another version would have renamed is missed when hooks are placed, not in the middle of a forward."""
    model = shared(name)
    attn = attention_of(blocks_of(name, model)[0])
    function = "apply_rotary_pos_emb" if name == "mistral3" else "apply_rotary_pos_emb_vision"
    inputs = FAMILIES[name].batch("2I3").inputs()
    with torch.no_grad():
        bare = model(**inputs).logits
        with monkeypatch.context() as patch:
            patch.delattr(sys.modules[type(attn).__module__], function)
            assert_refused(model, f"{function} beside {type(attn).__name__}")
        assert_same(model(**inputs).logits, bare)


def test_a_host_without_its_order_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing tells which rows see each other, so that nothing may leave inside the tower either."""
    model = shared("qwen2_5_vl")
    monkeypatch.delattr(sys.modules[type(model.model.visual).__module__], "get_vision_window_index")
    assert_refused(model, "no get_vision_window_index beside")
    with pytest.raises(SiteError, match="no get_vision_window_index beside"):
        vlmtok.compress(model, "tome:r=1")


def test_features_of_several_layers() -> None:
    model = shared("mistral3")
    model.model.config.vision_feature_layer = [-2, -1]
    try:
        assert_refused(model, r"features of several layers: \[-2, -1\]")
    finally:
        model.model.config.vision_feature_layer = -1


def test_features_of_an_earlier_layer() -> None:
    """`feature` is the block whose output the projector reads."""
    model = shared("mistral3")
    prompt = FAMILIES["mistral3"].prompt("2J3")
    listen = Listen(("received_attention",), ("feature",))
    try:
        model.model.config.vision_feature_layer = -2
        with vlmtok.compress(model, listen), torch.no_grad():
            model(**FAMILIES["mistral3"].collect(prompt).inputs())
    finally:
        model.model.config.vision_feature_layer = -1
    wanted = at_tokens("mistral3", prompt.pictures[0].shot.arrays, 1)["received_attention"]
    ((_, found),) = listen.heard
    ((need, value),) = found.items()
    assert_equal(token_first(need, value), wanted, 1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_a_projector_that_makes_other_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the host that joins other patches is no silent change."""
    model = shared(name)
    module = model.model.get_submodule(ROWS[name].projector)
    arrays = FAMILIES[name].prompt("2J3").pictures[0].shot.arrays
    made = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: made(*args, **kwargs)[..., :-1, :])
    with vlmtok.compress(model, "visionzip:keep=0.5"), pytest.raises(HostChanged, match="tokens of pictures of"):
        encode(model, arrays)


def test_a_block_by_itself() -> None:
    """Nothing told which pictures its rows are of."""
    model = shared("qwen2_vl")
    x, bounds = torch.randn(16, 32), torch.tensor([0, 16])
    table = (torch.ones(16, 8), torch.zeros(16, 8))
    with vlmtok.compress(model, "visionzip:keep=0.5"), pytest.raises(HostChanged, match="was told of 0 patches"):
        model.model.visual.blocks[0](x, cu_seqlens=bounds, position_embeddings=table)


def test_where_the_last_block_sees_windows_alone_the_report_says_so() -> None:
    """As it does where and why a method acts; released sizes end in a block that sees whole frames."""
    model = shared("qwen2_5_vl")
    inputs = FAMILIES["qwen2_5_vl"].batch("2J3").inputs()
    for method in METHODS:
        with vlmtok.compress(model, method) as run, torch.no_grad():
            model(**inputs)
            notes = run.report().notes
        assert any("acts at 'projected'" in note and "joins squares of patches" in note for note in notes)
        assert any("within windows: block 2 of the tower" in note for note in notes)
    with vlmtok.compress(shared("qwen2_vl"), "visionzip:scope=sample") as run, torch.no_grad():
        shared("qwen2_vl")(**inputs)
        notes = run.report().notes
    assert not any("windows" in note for note in notes)
    assert any("all pictures of a prompt together" in note for note in notes)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_half_precision(name: str, half: str) -> None:
    """Tokens are found again and the tower's signals are what half precision makes of them."""
    family = FAMILIES[name]
    model = shared(name) if half == "autocast" else family.build().bfloat16()
    inputs = family.batch(*family.several).inputs()
    if half == "weights":
        inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    listen = Listen(("received_attention", "turned_keys"))
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"),
        vlmtok.compress(model, [listen, vlmtok.VisionZip(keep=0.5)]) as run,
    ):
        assert model(**inputs).logits.isfinite().all()
        heard = list(listen.heard)  # a report asks methods once more, for what they cost
        before, left = run.report().visual("decoder")
    assert left < before
    prompt = family.batch(*family.several).prompts[1]
    wanted = at_tokens(name, prompt.pictures[0].shot.arrays)["received_attention"][:, 0]
    (found,) = (one for columns, one in heard if len(columns) == len(wanted))
    value = found["received_attention@vision:-1"].float()
    assert value.sum() == pytest.approx(float(wanted.sum()), rel=0.02)
    assert torch.corrcoef(torch.stack([value, wanted]))[0, 1] > 0.95


def test_a_compiled_tower() -> None:
    """Graphs break at hooks, as the host breaks them where it reads sizes; what comes out is the same."""
    family = FAMILIES["qwen2_5_vl"]
    inputs = family.batch(*family.rows).inputs()
    with torch.no_grad():
        with vlmtok.compress(shared("qwen2_5_vl"), "visionzip:keep=0.5"):
            wanted = shared("qwen2_5_vl")(**inputs).logits
        model = family.build()
        with vlmtok.compress(model, "visionzip:keep=0.5"):
            model.model.visual.compile(backend="eager")
            assert_equal(model(**inputs).logits, wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["visionzip:keep=0.5", "tome:r=2"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_a_compiled_model(name: str, method: str) -> None:
    """Hooks of tower, projector and language model all run between graphs: none sees what another did not leave."""
    family = FAMILIES[name]
    inputs, model = family.batch(*family.rows).inputs(), family.build()
    with torch.no_grad():
        bare = model(**inputs).logits
        with vlmtok.compress(model, method):
            wanted = model(**inputs).logits
            compiled = torch.compile(model, backend="eager")
            assert_equal(compiled(**inputs).logits, wanted)
    assert not torch.allclose(wanted, bare, atol=1e-3)
    torch._dynamo.reset()
