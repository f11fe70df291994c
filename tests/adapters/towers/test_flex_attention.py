"""Proportional attention by FlexAttention's score_mod: equal to the bias form of SDPA, beside the host's own masks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import flex
from support.checks import assert_differs, assert_equal, assert_same
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import CLIPConfig, CLIPModel
from vlmtok.adapters.towers.sized_attention import SizedAttention

import vlmtok
from vlmtok.core.attachment import Attachment
from vlmtok.core.site import Layout
from vlmtok.errors import PassError, UnsupportedModel
from vlmtok.lab.tiny import towers as tiny
from vlmtok.lab.tiny.families import FAMILIES, TOWER_ONLY

TOWERS = ("CLIPVisionModel", "SiglipVisionModel", "ViTModel", "Dinov2Model", "Blip2VisionModel", "CLIPModel")
SPECS = ("tome:r=3", "pitome:ratio=0.8", "crossget:rv=3", "tca:ratio=0.7:update=false")
VLMS = (
    *("llava", "internvl", "qianfan_ocr", "paligemma", "gemma3"),
    *("smolvlm", "idefics3"),  # padded rows of pictures, which the host hides
    *("mistral3", "paddleocr_vl", "qwen3_vl_moe"),  # all pictures in one row, kept apart by a mask or by boundaries
    *("blip-2", "instructblip", "instructblipvideo"),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    yield flex.uncompiled(monkeypatch)


def tower(kind: str, attention: str) -> Any:
    return tiny._hf(kind, attention).requires_grad_(False)


def run(model: Any, x: Tensor) -> Tensor:
    return model.vision_model(pixel_values=x)[0] if isinstance(model, CLIPModel) else model(pixel_values=x)[0]


def compressed(model: Any, spec: Any, x: Tensor) -> Tensor:
    with vlmtok.compress(model, spec):
        return run(model, x)


def configurations(model: nn.Module) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


# ---------------------------------------------------------------------- equal to the bias form
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_towers_equal_the_bias_form(kind: str, spec: str, calls: list[dict[str, Any]]) -> None:
    x = tiny.pictures(3)
    plain, flexible = tower(kind, "sdpa"), tower(kind, "flex_attention")
    before, bare = configurations(flexible), run(flexible, x)
    assert_equal(bare, run(plain, x), 1e-5)
    del calls[:]
    with vlmtok.compress(flexible, spec):
        found = run(flexible, x)
        assert len(calls) == tiny.DEPTH and calls[-1]["shape"][2] < calls[0]["shape"][2]
        assert all(call["block_mask"] is None or call["shape"] == calls[0]["shape"] for call in calls), "of old rows"
    assert_equal(found, compressed(plain, spec, x), 1e-5)
    if "tca" not in spec:
        assert_differs(found, compressed(plain, f"{spec}:prop_attn=false", x))
    after = configurations(flexible)
    assert len(after) == len(before) and all(one is other for one, other in zip(before, after))
    assert_same(run(flexible, x), bare)


@pytest.mark.parametrize("spec", SPECS[:3])
@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_families_equal_the_bias_form(name: str, spec: str, calls: list[dict[str, Any]]) -> None:
    family = {**FAMILIES, **TOWER_ONLY}[name]
    inputs = family.batch(*family.rows).inputs()
    logits = {}
    for attention in ("sdpa", "flex_attention"):
        model: Any = family.build(attention).requires_grad_(False)
        bare, before = model(**inputs).logits, configurations(model)
        with vlmtok.compress(model, spec):
            logits[attention] = model(**inputs).logits
        assert_differs(logits[attention], bare)
        assert_same(model(**inputs).logits, bare)
        assert all(one is other for one, other in zip(before, configurations(model)))
    assert len(calls) > 0
    assert_equal(logits["flex_attention"], logits["sdpa"], 1e-5)


class Held(vlmtok.Method):
    """Looks at keys, and merges nothing."""

    proportional = True

    def sites(self, layout: Any) -> list[vlmtok.Site]:
        return [vlmtok.Site("vision", layer, "mid", needs=("keys",)) for layer in range(2)]

    def reduce(self, view: Any) -> None:
        assert view.signal("keys").isfinite().all()

    def __str__(self) -> str:
        return "held"


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_keeping_all_changes_no_bit(kind: str, calls: list[dict[str, Any]]) -> None:
    model, x = tower(kind, "flex_attention"), tiny.pictures(2)
    bare = run(model, x)
    with vlmtok.compress(model, Held()) as attached:
        assert_same(run(model, x), bare)
        with attached.paused():
            assert_same(run(model, x), bare)
    assert_same(run(model, x), bare)


@torch.no_grad()
def test_detached_gives_each_attention_its_configuration_back(calls: list[dict[str, Any]]) -> None:
    model, x = tower("CLIPVisionModel", "flex_attention"), tiny.pictures(2)
    attentions = [module for module in model.modules() if type(module).__name__ == "CLIPAttention"]
    shared, bare = model.config, run(model, x)
    attached = vlmtok.compress(model, "tome:r=3")
    assert attentions[0].config is shared and all(attn.config is not shared for attn in attentions[1:])
    assert run(model, x).shape[1] < bare.shape[1]
    attached.remove()
    assert all(attn.config is shared for attn in attentions)
    assert_same(run(model, x), bare)
    with vlmtok.compress(model, "tome:r=3:prop_attn=false"):
        assert all(attn.config is shared for attn in attentions)


# ---------------------------------------------------------------------- masks of the host
@torch.no_grad()
def test_padding_stays_hidden(calls: list[dict[str, Any]]) -> None:
    family = FAMILIES["smolvlm"]
    model: Any = family.build("flex_attention").requires_grad_(False)
    inputs = family.batch(*family.rows).inputs()
    inputs["pixel_attention_mask"] = torch.ones_like(inputs["pixel_values"][:, :, 0], dtype=torch.bool)
    inputs["pixel_attention_mask"][0, 0, inputs["pixel_values"].shape[-2] // 2 :] = False
    twin: Any = family.build().requires_grad_(False)
    whole = torch.ones_like(inputs["pixel_attention_mask"])
    for spec in ("tome:r=2", "tome:r=2:prop_attn=false", "random:keep=0.6:stage=vision:layer=1"):
        with vlmtok.compress(model, spec), vlmtok.compress(twin, spec):
            del calls[:]
            found = model(**inputs).logits
            assert_equal(found, twin(**inputs).logits, 1e-5)
            full, inside = calls[0]["shape"], calls[: len(model.model.vision_model.encoder.layers)]
            shorter = [call for call in inside if call["shape"][2] < full[2]]
            assert isinstance(calls[0]["block_mask"], BlockMask)
            assert len(shorter) > 0 and all(call["block_mask"] is None for call in shorter)
            assert_differs(found, model(**{**inputs, "pixel_attention_mask": whole}).logits)


@torch.no_grad()
def test_a_causal_text_tower(calls: list[dict[str, Any]]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 63
    ids[0, 6:] = 63
    shown = torch.ones_like(ids)
    shown[0, 7:] = 0
    found = {}
    for attention in ("sdpa", "flex_attention"):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**sizes, "vocab_size": 64, "eos_token_id": 63, "bos_token_id": 0, "pad_token_id": 1},
            vision_config={**sizes, "image_size": 32, "patch_size": 8},
            attn_implementation=attention,
        )
        model = tiny.randomize(CLIPModel(config)).requires_grad_(False)
        given = {"input_ids": ids, "attention_mask": shown, "pixel_values": tiny.pictures(2, size=(32, 32))}
        bare = model(**given)
        with vlmtok.compress(model, "crossget:rv=2:rl=2") as attached:
            cut = model(**given)
            assert "text" in str(attached.report())
        assert_differs(cut.text_embeds, bare.text_embeds)
        assert_same(model(**given).text_embeds, bare.text_embeds)
        found[attention] = cut
    assert_equal(found["flex_attention"].text_embeds, found["sdpa"].text_embeds, 1e-5)
    assert_equal(found["flex_attention"].image_embeds, found["sdpa"].image_embeds, 1e-5)


@torch.no_grad()
def test_a_mask_that_hides_tokens_is_refused_as_elsewhere(calls: list[dict[str, Any]]) -> None:
    model, x = tower("ViTModel", "flex_attention"), tiny.pictures(2)
    shown = torch.ones(2, 37)
    shown[1, 30:] = 0
    with vlmtok.compress(model, "tome:r=3"):
        model(pixel_values=x, attention_mask=torch.ones(2, 37))
        with pytest.raises(PassError, match="attention mask that hides tokens"):
            model(pixel_values=x, attention_mask=shown)


@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 1, 1, 9), (1, 4, 9, 9)])
@torch.no_grad()
def test_what_the_host_masks_and_adds_stays(shape: tuple[int, ...], calls: list[dict[str, Any]]) -> None:
    """A BlockMask and a bias of the host's own, beside ours, by hand."""
    attn = tower("Blip2VisionModel", "flex_attention").encoder.layers[0].self_attn
    given, own, q, k, v = (
        torch.randn(size, generator=torch.Generator().manual_seed(seed))
        for seed, size in enumerate([shape, (2, 4, 9, 9), *[(2, 4, 9, 8)] * 3])
    )
    attachment = Attachment([], Layout("none", {}))
    SizedAttention(attachment).install(attn, lambda module, q, k: given)
    causal = create_block_mask(lambda b, h, i, j: i >= j, 2, None, 9, 9, device="cpu")
    found = attn.config.table["vlmtok_sized"](attn, q, k, v, causal, scaling=0.5, position_bias=own)[0]
    logits = q @ k.transpose(-1, -2) * 0.5 + own + (given if given.dim() == 4 else given.reshape(-1, 1, 1, 9))
    weights = logits.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    assert_equal(found, (weights @ v).transpose(1, 2), 1e-5)
    attachment.remove()


# ---------------------------------------------------------------------- language models
@pytest.mark.parametrize("name", ["llava", "qwen3_vl_moe"])
@torch.no_grad()
def test_a_language_models_boundary_is_cut_and_its_inside_refused(name: str, calls: list[dict[str, Any]]) -> None:
    family = FAMILIES[name]
    inputs = family.batch(*family.rows).inputs()
    model: Any = family.build("flex_attention").requires_grad_(False)
    twin: Any = family.build().requires_grad_(False)
    bare = model(**inputs).logits
    with vlmtok.compress(model, "random:keep=0.5"), vlmtok.compress(twin, "random:keep=0.5"):
        found = model(**inputs).logits
        assert all(call["block_mask"].shape[2] == call["shape"][2] for call in calls[-2:]), "made for these rows"
        assert_equal(found, twin(**inputs).logits, 2e-5)
    assert_differs(found, bare)
    for spec in ("fastv", "ems_style", "snapkv"):
        with pytest.raises(UnsupportedModel, match="known with sdpa, eager and flash attention, not 'flex_attention'"):
            vlmtok.compress(model, spec)
    assert_same(model(**inputs).logits, bare)


# ---------------------------------------------------------------------- refused
@torch.no_grad()
def test_a_flex_attention_without_an_argument_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tower("CLIPVisionModel", "flex_attention")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", lambda module, q, k, v, mask: None)
    with pytest.raises(UnsupportedModel, match="flex_attention takes no bias on the keys"):
        vlmtok.compress(model, "tome:r=3")
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_switching_while_attached(calls: list[dict[str, Any]]) -> None:
    x = tiny.pictures(2)
    model = tower("CLIPVisionModel", "flex_attention")
    with vlmtok.compress(model, "tome:r=3"):
        one = run(model, x)
        model.set_attn_implementation("sdpa")
        assert_equal(run(model, x), one, 1e-5)
    with vlmtok.compress(model, "tome:r=3"):
        model.set_attn_implementation("flex_attention")
        with pytest.raises(PassError, match="CLIPAttention was switched to flex_attention after"):
            run(model, x)


# ---------------------------------------------------------------------- compiled
@pytest.mark.parametrize("spec", ["tome:r=3", "tome:r=3:prop_attn=false"])
@torch.no_grad()
def test_a_graph_around_it_is_refused_or_left(spec: str, calls: list[dict[str, Any]]) -> None:
    model, x = tower("CLIPVisionModel", "flex_attention"), tiny.pictures(2)
    with vlmtok.compress(model, spec):
        plain = run(model, x)
        with pytest.raises(Exception, match="torch.compile cannot take a compressed tower"):
            torch.compile(model, backend="eager", fullgraph=True)(pixel_values=x)
        torch._dynamo.reset()
        assert_equal(torch.compile(model, backend="eager")(pixel_values=x)[0], plain, 1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # which the host gives
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@torch.no_grad()
def test_the_compiled_form() -> None:
    """As the host calls it: fused, a mask that the compiler reads, rows of several lengths."""
    x = tiny.pictures(2)
    for kind in ("CLIPVisionModel", "ViTModel"):
        model = tower(kind, "flex_attention")
        with vlmtok.compress(model, "tome:r=3"):
            assert_equal(run(model, x), compressed(tower(kind, "sdpa"), "tome:r=3", x), 1e-5)
