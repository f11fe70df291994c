"""Merging inside towers that hold all pictures in one row: against a loop of plain tensor operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import hosts_of
from support.checks import assert_equal
from torch import Tensor

import vlmtok
from vlmtok import Layout, Method, Reduction, Site, TokenView
from vlmtok.errors import UnsupportedModel

from .build import FAMILIES, shared
from .harness import generate
from .packed_merging_by_hand import PACKED, Decide, Made, Moment, blocks_of, by_hand, by_method, crossget, pitome, tome
from .pictures import at_tokens, clips, pictures
from .test_token_signals import Listen

DEPTH = 3

WAYS: dict[str, tuple[str, Callable[[], Decide], bool]] = {
    "tome": ("tome:r=3", lambda: tome(3), True),
    "tome without sizes": ("tome:r=3:prop_attn=false", lambda: tome(3), False),
    "pitome": ("pitome:ratio=0.7", lambda: pitome(0.7, DEPTH), True),
    "pitome without sizes": ("pitome:ratio=0.7:prop_attn=false", lambda: pitome(0.7, DEPTH), False),
    "crossget": ("crossget:rv=3", lambda: crossget(3), True),
    "tca": ("tca:ratio=0.6", lambda: by_method(vlmtok.create_method("tca", ratio=0.6), DEPTH), False),
}


def features(model: Any, name: str, arrays: dict[str, Tensor]) -> Tensor:
    """What the language model gets of pictures or clips, `[tokens, C]`, levels side by side."""
    video = "pixel_values_videos" in arrays
    encode = model.model.get_video_features if video else model.model.get_image_features
    out = encode(**arrays, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    return torch.cat([torch.cat([part.reshape(-1, part.shape[-1]) for part in level]) for level in levels], -1)


def close(found: Tensor, wanted: Tensor, share: float = 2e-6) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


def shots(name: str) -> list[dict[str, Tensor]]:
    return [pictures(name), *([clips(name)] if FAMILIES[name].clips else [])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_merging_equals_the_loop(name: str, way: str) -> None:
    spec, decide, sized = WAYS[way]
    model = shared(name)
    for arrays in shots(name):
        bare = features(model, name, arrays)
        with by_hand(model, decide(), sized):
            wanted = features(model, name, arrays)
        with vlmtok.compress(model, spec):
            found = features(model, name, arrays)
        close(found, wanted)
        assert float((wanted - bare).abs().max()) > 1e-2 * float(bare.abs().max())
        assert torch.equal(features(model, name, arrays), bare)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_where_nothing_merges_nothing_changes(name: str) -> None:
    """A share that leaves every token of segments this small."""
    model = shared(name)
    for arrays in shots(name):
        bare = features(model, name, arrays)
        with vlmtok.compress(model, "pitome:ratio=0.99") as run:
            assert torch.equal(features(model, name, arrays), bare)
            assert all(event.kind == "observe" for event in run._attachment.ledger.last["vision"].events)


@pytest.mark.parametrize("way", ["tome", "pitome"])
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_eager_attention_too(name: str, way: str) -> None:
    spec, decide, sized = WAYS[way]
    arrays = pictures(name)
    model = shared(name, "eager")
    with by_hand(model, decide(), sized):
        wanted = features(model, name, arrays)
    with vlmtok.compress(model, spec):
        close(features(model, name, arrays), wanted)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "mistral3"])
@torch.no_grad()
def test_two_methods_in_one_block(name: str) -> None:
    """The second one is shown what the first one left, with the keys of the tokens that stay."""
    model, arrays = shared(name), pictures(name)
    with by_hand(model, [tome(2), pitome(0.8, DEPTH)], True):
        wanted = features(model, name, arrays)
    with vlmtok.compress(model, "tome:r=2+pitome:ratio=0.8"):
        close(features(model, name, arrays), wanted)


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "pictures") for n in PACKED), *((n, "clips") for n in PACKED if FAMILIES[n].clips)]
)
@torch.no_grad()
def test_signals_behind_merges_reach_the_language_model(name: str, kind: str) -> None:
    """Every patch has what the token of its slot has, and a visual token the mean of its patches."""
    family, model = FAMILIES[name], shared(name)
    pattern = "2I3J5" if kind == "pictures" else "3V2W4"
    inputs = family.batch(pattern).inputs()
    names = ("received_attention", "turned_keys")
    listen = Listen(names)
    with vlmtok.compress(model, ["tome:r=3", listen]):
        model(**inputs)
    with by_hand(model, tome(3), True) as loop:
        model(**inputs)
    ((_, found),) = listen.heard
    for signal in names:
        wanted = at_tokens(name, loop.heard[signal], inputs)
        value = found[f"{signal}@vision:-1"]
        close(value[:, None] if value.dim() == 1 else value, wanted)


@pytest.mark.parametrize("name", PACKED)
def test_merging_with_a_method_behind_the_tower(name: str) -> None:
    """VisionZip chooses by signals of the shorter rows, and leaves as many tokens as it is told."""
    family, model = FAMILIES[name], shared(name)
    inputs = family.batch(*family.several).inputs()
    with vlmtok.compress(model, ["tome:r=3", "visionzip:keep=4"]) as run:
        generate(model, inputs, 2)
        passed = run._attachment.ledger.last["decoder"]
    gone = passed.entered - passed.columns
    with vlmtok.compress(model, "visionzip:keep=4") as run:
        generate(model, inputs, 2)
        passed = run._attachment.ledger.last["decoder"]
    assert gone == passed.entered - passed.columns > 0


@dataclass(eq=False)
class Fourths(Method):
    """Every fourth token takes the one behind it, in the first two blocks: nothing hangs on a rounded number."""

    proportional = True

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("vision", layer, "mid") for layer in (0, 1)]

    def reduce(self, view: TokenView) -> Reduction:
        batch, n, _ = view.tokens.shape
        src = torch.arange(1, n, 4)
        keep = torch.tensor([i for i in range(n) if i % 4 != 1])
        return Reduction(*(x.expand(batch, -1) for x in (keep, src, torch.searchsorted(keep, src) - 1)))

    @staticmethod
    def decide(now: Moment) -> Made | None:
        n = len(now.x)
        joins = {i: [(i + 1, None)] if i % 4 == 0 and i + 1 < n else [] for i in range(n) if i % 4 != 1}
        return [(i, joined, None) for i, joined in joins.items()] if now.layer < 2 else None


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_half_precision(name: str) -> None:
    model = FAMILIES[name].build().to(torch.bfloat16)
    arrays = {key: value.bfloat16() if value.is_floating_point() else value for key, value in pictures(name).items()}
    with by_hand(model, Fourths.decide, False):
        plain = features(model, name, arrays)
    with by_hand(model, Fourths.decide, True):
        wanted = features(model, name, arrays)
    with vlmtok.compress(model, Fourths()):
        found = features(model, name, arrays)
    assert found.dtype == torch.bfloat16
    away = [float((one - wanted).float().norm() / wanted.float().norm()) for one in (found, plain)]
    assert away[0] < 0.02 < away[1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_answers_are_those_of_the_loop(name: str, options: dict[str, Any]) -> None:
    """Rows with several pictures, and clips; the language model's tokens are as many as without."""
    if options.get("num_beams") and name.startswith("glm"):
        options = {"num_beams": 1}  # its own beams mix up pictures of a row
    model, family = shared(name), FAMILIES[name]
    for patterns in (family.several, *([family.clips] if family.clips else [])):
        inputs = family.batch(*patterns).inputs()
        with by_hand(model, tome(3), True):
            wanted = generate(model, inputs, 3, **options)
        with vlmtok.compress(model, "tome:r=3") as run:
            found = generate(model, inputs, 3, **options)
            passed = run._attachment.ledger.last["decoder"]
            assert passed.columns == passed.entered
        assert torch.equal(found[0], wanted[0])
        assert_equal(found[1], wanted[1], 1e-4)


def gradients(model: Any, name: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    features(model, name, arrays).square().mean().backward()
    return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("way", ["tome", "pitome", "crossget"])
@pytest.mark.parametrize("name", PACKED)
def test_gradients_are_those_of_the_loop(name: str, way: str, checkpointed: bool) -> None:
    spec, decide, sized = WAYS[way]
    model, arrays = FAMILIES[name].build().train(), pictures(name)
    with by_hand(model, decide(), sized):
        wanted = gradients(model, name, arrays)
    bare = gradients(model, name, arrays)
    if checkpointed:
        hosts_of.checkpoint(model)
    with vlmtok.compress(model, spec) as run:
        found = gradients(model, name, arrays)
        assert set(run._attachment.ledger.fired.values()) == {1}
    assert set(found) == set(wanted)
    most = max(float(value.abs().max()) for value in wanted.values())
    for key, value in wanted.items():
        away = float((found[key] - value).abs().max())
        assert away <= 1e-4 * float(value.abs().max()) + 1e-6 * most, f"{key}: {away:.1e}"
    assert any(float((value - bare[key]).abs().max()) > 0.1 * float(value.abs().max()) for key, value in wanted.items())


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_nothing_is_left_behind(name: str) -> None:
    model, arrays = FAMILIES[name].build(), pictures(name)
    keys, bare = list(model.state_dict()), features(model, name, arrays)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    with vlmtok.compress(model, "tome:r=3") as run:
        merged = features(model, name, arrays)
        assert not torch.equal(merged, bare)
        assert list(model.state_dict()) == keys
        assert torch.equal(features(copy.deepcopy(model), name, arrays), bare)
        with run.paused():
            assert torch.equal(features(model, name, arrays), bare)
        assert torch.equal(features(model, name, arrays), merged)
    assert torch.equal(features(model, name, arrays), bare)
    assert all(
        one is other
        for one, other in zip(configs, [m.config for m in model.modules() if hasattr(m, "config")], strict=True)
    )


@pytest.mark.parametrize("name", PACKED)
def test_attention_without_biases_is_refused(name: str) -> None:
    """Flash attention takes none; Pixtral tells it boundaries where no hook follows."""
    model = FAMILIES[name].build()
    tower = blocks_of(model)[0]
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    for spec in ("tome:r=3", "pitome:ratio=0.7", "crossget:rv=2"):
        with pytest.raises(UnsupportedModel, match="flash_attention_2"):
            vlmtok.compress(model, spec)
    if name == "mistral3":
        with pytest.raises(UnsupportedModel, match="flash_attention_2"):
            vlmtok.compress(model, "tome:r=3:prop_attn=false")
    else:
        vlmtok.compress(model, "tome:r=3:prop_attn=false").remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
