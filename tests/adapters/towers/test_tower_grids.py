"""Rows and columns of patches at any size of picture, the way back from cut rows, and maps of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import models
from support.checks import assert_differs, assert_same
from support.tower_specs import Grids, spec_of
from torch import Tensor, nn

import vlmtok
from vlmtok.errors import PassError
from vlmtok.lab.tiny.towers import timm_vit

# ---------------------------------------------------------------------- rows and columns of patches
OBLONG = (32, 72)
"""4 x 9 patches: as many as the 6 x 6 of the configured size."""


def _dynamic(name: str, **changes: object) -> Callable[[], nn.Module]:
    return lambda: timm_vit(name, dynamic_img_size=True, **changes)


def _interpolated(model: nn.Module, x: Tensor) -> Any:
    return model(pixel_values=x, interpolate_pos_encoding=True)


def _encoded(model: nn.Module, x: Tensor) -> Any:
    return model.encode_image(x) if hasattr(model, "encode_image") else model(x)


OTHER_SIZES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any]]] = {
    "timm ViT": (_dynamic("vit_tiny_patch16_224"), _encoded),
    "timm DINOv2 registers": (_dynamic("vit_small_patch14_reg4_dinov2"), _encoded),
    "timm SigLIP": (_dynamic("vit_base_patch16_siglip_224"), _encoded),
    "timm padded": (_dynamic("vit_tiny_patch16_224", dynamic_img_pad=True), lambda m, x: m(x[:, :, :-3, :-1])),
    "timm EVA-02": (_dynamic("eva02_base_patch14_224"), _encoded),
    "timm DINOv3": (_dynamic("vit_small_patch16_dinov3"), _encoded),
    "timm size set": (lambda: _resized(timm_vit("vit_tiny_patch16_224")), _encoded),
    "open_clip VisionTransformer": (lambda: models.fresh("open_clip VisionTransformer"), _encoded),
    "open_clip CLIP": (lambda: models.fresh("open_clip CLIP"), _encoded),
    "HF CLIP vision": (lambda: models.fresh("HF CLIP vision"), _interpolated),
    "HF SigLIP vision": (lambda: models.fresh("HF SigLIP vision"), _interpolated),
    "HF ViT": (lambda: models.fresh("HF ViT"), _interpolated),
    "HF DINOv2": (lambda: models.fresh("HF DINOv2"), lambda m, x: m(pixel_values=x)),
    "HF CLIPModel": (
        lambda: models.fresh("HF CLIPModel"),
        lambda m, x: m.get_image_features(pixel_values=x, interpolate_pos_encoding=True),
    ),
}


def _resized(model: Any) -> nn.Module:
    model.set_input_size(OBLONG)
    return model


@pytest.mark.parametrize("size", [OBLONG, (72, 32), (48, 48), (56, 40)])
@pytest.mark.parametrize("name", OTHER_SIZES)
def test_the_grid_is_that_of_the_pixels(name: str, size: tuple[int, int]) -> None:
    make, run = OTHER_SIZES[name]
    model, x = make(), models.pictures(2, size=(80, 80))[:, :, : size[0], : size[1]]
    if (name.startswith("open_clip") and size == (56, 40)) or (name == "timm size set" and size != OBLONG):
        with pytest.raises((RuntimeError, AssertionError)):  # the host takes no other count or size
            run(model, x)
        return
    look = Grids()
    with torch.no_grad(), vlmtok.compress(model, look, trace=True) as handle:
        run(model, x)
        grids = {picture.grid for picture in handle.trace().pictures}
    grid = (size[0] // models.PATCH, size[1] // models.PATCH)
    assert look.seen == [grid] * 3 and grids == {grid}


@pytest.mark.parametrize("name", models.TOWERS)
def test_every_tower_knows_its_grid(name: str) -> None:
    tower, look = models.TOWERS[name], Grids()
    model = models.shared(name)
    with torch.no_grad(), vlmtok.compress(model, look, trace=True) as handle:
        tower.run(model, tower.pictures(2))
        assert handle.trace()[1].grid == look.seen[0] == tuple(n // models.PATCH for n in tower.size)


def test_patches_that_form_no_grid_have_none() -> None:
    model, look = timm_vit("vit_tiny_patch16_224", patch_drop_rate=0.25).train(), Grids()
    with vlmtok.compress(model, look, trace=True) as handle:
        model(models.pictures(2))
        assert look.seen == [None] * 3 and handle.trace()[0].grid is None


# ---------------------------------------------------------------------- what outputs are: rows as cut, and the way back
class Drop(vlmtok.Method):
    """Drops, or joins with its left neighbour, every second token in two blocks."""

    proportional = False

    def __init__(self, merge: bool, first: int = 1) -> None:
        self.merge = merge
        self.first = first

    def sites(self, layout: Any) -> list[vlmtok.Site]:
        return [vlmtok.Site("vision", self.first, "mid"), vlmtok.Site("vision", self.first + 1, "end")]

    def reduce(self, view: Any) -> vlmtok.Reduction:
        batch, n, _ = view.tokens.shape
        keep = torch.arange(0, n, 2).expand(batch, -1).flip(1)  # slots in an order of their own
        if not self.merge:
            return vlmtok.Reduction(keep)
        src = torch.arange(1, n, 2).expand(batch, -1)
        return vlmtok.Reduction(keep, src, keep.shape[1] - 1 - src // 2)

    def count(self, counts: Any) -> int:
        return (counts.n + 1) // 2

    def __str__(self) -> str:
        return "drop"


def _blocks_gave(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What every block gave, as a hook behind ours sees it."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, y: seen.append((y[0] if isinstance(y, tuple) else y).clone()))
        for block in spec_of(model).blocks
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _cut_by_hand(slots: list[list[int]], merge: bool) -> list[list[int]]:
    """What `Drop` does, with the patches of each slot written out."""
    slots = slots if len(slots) % 2 == 0 else [*slots, []]
    pairs = list(zip(slots[::2], slots[1::2]))
    return [own + (other if merge else []) for own, other in reversed(pairs)]


@pytest.mark.parametrize("merge", [False, True], ids=["dropped", "merged"])
@pytest.mark.parametrize("name", models.TOWERS)
def test_rows_of_every_block_go_back_to_the_grid(name: str, merge: bool) -> None:
    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)
    with torch.no_grad(), vlmtok.compress(model, Drop(merge), trace=True) as run:
        rows = _blocks_gave(model, lambda: tower.run(model, x))
        trace = run.trace()
    n = tower.size[0] * tower.size[1] // models.PATCH**2
    whole = [[patch] for patch in range(n)]
    once = _cut_by_hand(whole, merge)
    twice = _cut_by_hand(once, merge)
    for layer, slots in enumerate((whole, once, twice, twice)):
        for picture in range(2):
            tokens = rows[layer][picture, tower.prefix :]
            assert len(tokens) == len(slots)
            wanted = torch.zeros(n, tokens.shape[1])
            for slot, patches in enumerate(slots):
                wanted[patches] = tokens[slot]
            assert_same(trace[picture].restore(rows[layer][picture], layer), wanted)
    assert_same(trace[0].restore(rows[3][0]), trace[0].restore(rows[3][0], 3))
    with pytest.raises(vlmtok.errors.ParameterError, match="row"):
        trace[0].restore(rows[0][0], 2)


@pytest.mark.parametrize("spec", ["tome:r=4", "random:keep=0.5", "pitome:ratio=0.8"])
@pytest.mark.parametrize("name", ["HF CLIP vision", "HF SigLIP vision", "HF DINOv2", "HF ViT", "HF BLIP-2 vision"])
def test_hidden_states_of_transformers_are_rows_as_cut(name: str, spec: str) -> None:
    """One rule for every field: hidden state i + 1 is what block i gave, and the last is what follows it."""
    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)
    with torch.no_grad(), vlmtok.compress(model, spec, trace=True) as run:
        seen: list[Any] = []
        rows = _blocks_gave(model, lambda: seen.append(model(pixel_values=x, output_hidden_states=True)))
        output, trace = seen[0], run.trace()
        assert len(output.hidden_states) == models.DEPTH + 1
        for layer in range(models.DEPTH - 1):
            assert_same(output.hidden_states[layer + 1], rows[layer])
            assert trace[0].restore(output.hidden_states[layer + 1][0], layer).shape[0] == models.PATCHES
        last = output.last_hidden_state
        assert last.shape == output.hidden_states[-1].shape and last.shape[1] < models.PATCHES
        assert trace[1].restore(last[1]).shape[0] == models.PATCHES
        # Right way round: each patch has the row of its slot.
        owner = trace[1].owner
        restored = trace[1].restore(last[1])
        for slot in owner[owner >= 0].unique():
            assert bool((restored[owner == slot] == restored[owner == slot][0]).all())


# ---------------------------------------------------------------------- maps
def _maps(model: Any, x: Tensor, form: str) -> Any:
    model = getattr(model, "visual", model)
    return model.forward_intermediates(x, output_fmt=form)


MAPPED = [name for name in models.TOWERS if not name.startswith("HF")]


@pytest.mark.parametrize("spec", ["tome:r=4", "random:keep=0.5", "random:keep=0.25", "pitome:ratio=0.8"])
@pytest.mark.parametrize("name", MAPPED)
def test_maps_of_shortened_rows_are_refused_never_scrambled(name: str, spec: str) -> None:
    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)
    with torch.no_grad(), vlmtok.compress(model, spec, trace=True) as run:
        with pytest.raises(PassError, match=r"NCHW.*NLC"):
            _maps(model, x, "NCHW")
        out = _maps(model, x, "NLC")
        rows = out["image_intermediates"] if isinstance(out, dict) else out[1]
        trace = run.trace()
        grid = trace[0].grid
        assert len(rows) == models.DEPTH and rows[-1].shape[1] < grid[0] * grid[1]
        for layer, found in enumerate(rows):
            assert trace[0].restore(found[0], layer).shape[0] == grid[0] * grid[1]
    with torch.no_grad():
        _maps(model, x, "NCHW")  # bare again


@pytest.mark.parametrize("name", ["timm ViT", "timm EVA-02"])
def test_other_callers_of_maps(name: str) -> None:
    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)
    idle = Grids()
    idle.reduce = lambda view: None  # type: ignore[method-assign]
    with torch.no_grad():
        bare = _maps(model, x, "NCHW")[1]
        with vlmtok.compress(model, idle):  # nothing is cut, nothing is refused
            for one, other in zip(_maps(model, x, "NCHW")[1], bare):
                assert_same(one, other)
        with vlmtok.compress(model, "tome:r=4"):
            if hasattr(model, "get_intermediate_layers"):
                with pytest.raises(PassError, match="NCHW"):
                    model.get_intermediate_layers(x, n=2, reshape=True)
                rows = model.get_intermediate_layers(x, n=2)
                assert rows[0].shape[1] < models.PATCHES
            with pytest.raises(PassError, match="NCHW"):
                model.forward_intermediates(x)  # maps are the default
            assert_differs(model(x), tower.run(copy.deepcopy(model), x))
