"""Towers that are not quite what a row was written for: other attention, wrapped classes, other sizes, maps."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families.build import FAMILIES, TOWER_ONLY
from support import models
from support.checks import assert_differs, assert_equal, assert_same
from support.sweep import some
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from vlmtok.adapters import adapter_for, forms
from vlmtok.adapters.base import TowerSpec, child

import vlmtok
from vlmtok.errors import MissingSignal, PassError, UnsupportedModel, VlmtokError
from vlmtok.lab.tiny.towers import timm_vit

SIGNALLED = ("tome:r=4:prop_attn=false", "crossget:rv=6", "tca:ratio=0.6:update=false")
PLAIN = "random:keep=0.5"


def spec_of(model: nn.Module) -> TowerSpec:
    adapter = adapter_for(model)
    if hasattr(adapter, "vision") and not callable(adapter.vision):  # open_clip's dual encoders
        adapter = adapter.vision
    found = getattr(adapter, "inner", adapter).tower()
    assert found is not None
    return found


def attentions(model: nn.Module) -> list[nn.Module]:
    spec = spec_of(model)
    return [child(block, spec.block.attn) for block in spec.blocks]


# ---------------------------------------------------------------------- attention of another form
def _other(attn: nn.Module) -> None:
    """A subclass with a forward of its own, which may do anything."""
    kind = type(attn)

    class Turned(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    attn.__class__ = Turned


def _patched(attn: nn.Module) -> None:
    """A forward of its own on the instance."""
    real = type(attn).forward
    attn.forward = types.MethodType(lambda self, *args, **kwargs: real(self, *args, **kwargs), attn)


@pytest.mark.parametrize("change", [_other, _patched])
@pytest.mark.parametrize("name", models.TOWERS)
def test_attention_of_another_form_is_refused_where_it_must_be_known(name: str, change: Callable[..., None]) -> None:
    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)
    with torch.no_grad():
        bare = tower.run(model, x)
    changed = attentions(model)[1]
    change(changed)
    before = len([m for m in model.modules() for _ in m._forward_pre_hooks])
    for method in (*SIGNALLED, "tome:r=4"):
        with pytest.raises(VlmtokError, match=type(changed).__name__) as caught:
            vlmtok.compress(model, method)
        assert isinstance(caught.value, (MissingSignal, UnsupportedModel))
    assert len([m for m in model.modules() for _ in m._forward_pre_hooks]) == before
    with torch.no_grad(), vlmtok.compress(model, PLAIN):  # what asks nothing of the attention goes on
        assert_differs(tower.run(model, x), bare)


def test_differential_attention_of_timm_is_refused_by_name() -> None:
    model = timm_vit("vit_tiny_patch16_224", attn_layer="diff")
    for method in (*SIGNALLED, "pitome:ratio=0.9"):
        with pytest.raises(MissingSignal, match="DiffAttention"):
            vlmtok.compress(model, method)
    with torch.no_grad(), vlmtok.compress(model, PLAIN):
        assert_differs(model(torch.ones(1, 3, 48, 48)), model.forward_head(torch.zeros(1, 37, 32)))


@pytest.mark.parametrize("name", ["HF CLIP vision", "HF SigLIP vision", "HF ViT", "HF DINOv2", "HF CLIPModel"])
def test_attention_functions_of_transformers(name: str) -> None:
    """Flash and flex attention are the same function of q and k; what else is registered may be anything."""
    from transformers import AttentionInterface

    AttentionInterface.register("somebodys", lambda *args, **kwargs: None)
    model = models.fresh(name)
    for kind, signals in (("somebodys", False), ("flex_attention", True)):
        for attn in attentions(model):
            attn.config._attn_implementation = kind
        with pytest.raises(UnsupportedModel if signals else VlmtokError, match=kind):
            vlmtok.compress(model, "tome:r=4")
        if signals:
            vlmtok.compress(model, SIGNALLED[0]).remove()
        else:
            with pytest.raises(MissingSignal, match=kind):
                vlmtok.compress(model, SIGNALLED[0])


# ---------------------------------------------------------------------- subclasses by wrapping
class Wrapping:
    """What FSDP2 and others put in front of a class."""

    def wrapped(self) -> bool:
        return True


def swap(model: nn.Module) -> None:
    """Every module becomes one of a subclass that a wrapper made."""
    for module in list(model.modules()):
        if type(module) is not nn.Identity:
            module.__class__ = type(f"FSDP{type(module).__name__}", (Wrapping, type(module)), {})


WRAPPED = ("tome:r=4", "crossget:rv=6", PLAIN)


@pytest.mark.parametrize(
    ("name", "spec", "order"), some([*models.TOWERS], WRAPPED, ("swap, compress", "compress, swap"), every=3)
)
def test_a_class_made_by_wrapping_counts_as_its_parent(name: str, spec: str, order: str) -> None:
    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)
    try:
        with torch.no_grad(), vlmtok.compress(model, spec) as run:
            wanted, books = tower.run(model, x), run.report()
    except VlmtokError as refusal:
        swap(model)
        with pytest.raises(type(refusal)):
            vlmtok.compress(model, spec)
        return
    if order.startswith("swap"):
        swap(model)
    run = vlmtok.compress(model, spec)
    if order.startswith("compress"):
        swap(model)
    with torch.no_grad(), run:
        assert_same(tower.run(model, x), wanted)
        assert run.report().macs == books.macs
    assert_differs(wanted, tower.run(model, x).detach())


BY_NAME = {"llava", "llava_next", "llava_onevision", "mistral3", "aya_vision"}
"""Families that read hidden states, which transformers records by the names of the tower's and its layers' classes."""


@pytest.mark.parametrize(
    ("name", "spec"),
    some(
        [*sorted(set(FAMILIES) - {"llama4"}), *TOWER_ONLY],  # bare, llama4 fails on such classes
        ("random:keep=0.5", "tome:r=2:prop_attn=false", "fastv:K=2:keep=0.5"),
        every=2,
    ),
)
def test_language_models_whose_classes_were_wrapped(name: str, spec: str) -> None:
    family = {**FAMILIES, **TOWER_ONLY}[name]
    model, inputs = family.build(family.attentions[0]), family.batch(*family.rows).inputs()
    try:
        with torch.no_grad(), vlmtok.compress(model, spec):
            wanted = model(**inputs).logits
    except VlmtokError as refusal:
        wanted = type(refusal)
    core = (model, model.model) if name in BY_NAME else ()
    for module in list(model.modules()):
        recorded = isinstance(module, (GradientCheckpointingLayer, PreTrainedModel)) and module not in core
        by_name = name in BY_NAME and recorded
        if type(module).__module__.startswith("transformers.models") and not by_name:
            module.__class__ = type(f"FSDP{type(module).__name__}", (Wrapping, type(module)), {})
    if isinstance(wanted, type):
        with pytest.raises(wanted), vlmtok.compress(model, spec):
            model(**inputs)
        return
    with torch.no_grad(), vlmtok.compress(model, spec):
        assert_same(model(**inputs).logits, wanted)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["shard, compress", "compress, shard"])
@pytest.mark.parametrize("spec", WRAPPED)
@pytest.mark.parametrize("name", ["timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIPModel", "HF DINOv2"])
def test_fully_sharded_models(one_process: None, name: str, spec: str, order: str) -> None:
    from torch.distributed.fsdp import fully_shard

    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)

    def shard() -> None:
        for block in spec_of(model).blocks:
            fully_shard(block)
        # Only what is called as a whole can be sharded as a whole.
        if tower.run.__name__ == "_logits":
            fully_shard(model)

    with torch.no_grad(), vlmtok.compress(model, spec):
        wanted = tower.run(model, x)
    if order.startswith("shard"):
        shard()
    run = vlmtok.compress(model, spec)
    if order.startswith("compress"):
        shard()
    with torch.no_grad(), run:
        assert_equal(tower.run(model, x), wanted)


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF ViT"])
def test_blocks_with_a_forward_of_their_own_are_refused(name: str) -> None:
    model = models.fresh(name)
    block = spec_of(model).blocks[1]
    _other(block)
    with pytest.raises(UnsupportedModel, match="Turned"):
        vlmtok.compress(model, PLAIN)


@pytest.mark.parametrize("name", ["timm ViT", "timm EVA", "open_clip CLIP", "HF ViT", "HF SigLIP vision"])
def test_checkpoint_wrappers_around_blocks(name: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    tower, model = models.TOWERS[name], models.fresh(name)
    x = tower.pictures(2)

    def gradients(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        with vlmtok.compress(model, "tome:r=4"):
            tower.run(model, x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients(model)
    blocks = {id(block) for block in spec_of(model).blocks}
    for module in list(model.modules()):
        for key, below in list(module.named_children()):
            if id(below) in blocks:
                wrapper = checkpoint_wrapper(below, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
                module._modules[key] = wrapper
    found = gradients(model)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert_equal(one, other, 1e-4)


def test_forms_see_what_a_module_runs() -> None:
    model = models.fresh("timm ViT")
    attn = model.blocks[0].attn
    assert forms.form(attn) == "timm.layers.attention:Attention"
    twin = copy.deepcopy(attn)
    _patched(twin)
    assert (
        forms.form(twin) == "" and forms.known(attn, ("timm:Attention",)) and not forms.known(twin, ("timm:Attention",))
    )
    assert not forms.known(attn, ("tim:Attention",)) and not forms.known(attn, ("timm.layers:Attn",))


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


class Grids(vlmtok.Method):
    """Notes the grids that views tell, and halves them."""

    proportional = False

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def sites(self, layout: Any) -> list[vlmtok.Site]:
        return [vlmtok.Site("vision", layer, point) for layer, point in ((0, "start"), (1, "mid"), (2, "end"))]

    def reduce(self, view: Any) -> vlmtok.Reduction:
        self.seen.append(view.grid)
        return vlmtok.Reduction(torch.arange(0, view.tokens.shape[1] - 1).expand(view.tokens.shape[0], -1))

    def count(self, counts: Any) -> int:
        return counts.n - 1

    def __str__(self) -> str:
        return "grids"


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
@pytest.mark.parametrize("name", ["HF CLIP vision", "HF SigLIP vision", "HF DINOv2", "HF ViT"])
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
