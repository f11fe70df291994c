"""Copies of compressed models, and transforms of torch that look into them: they work, or say in one line why not."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from support import models
from support.checks import assert_differs, assert_equal, assert_same, hooks
from support.sweep import some
from torch import Tensor, nn

import vlmtok
from vlmtok.errors import PassError, UnsupportedModel, VlmtokError

PLAIN = "random:keep=0.5"
SPECS = ("tome:r=4", "tome:r=4:prop_attn=false", "pitome:ratio=0.8", "crossget:rv=6", PLAIN)
FEW = (
    "timm ViT",
    "timm EVA-02",
    "timm SigLIP",
    "open_clip CLIP",
    "HF CLIP vision",
    "HF ViT",
    "HF DINOv2",
    "HF BLIP-2 vision",
)


def compressed(name: str, spec: str) -> tuple[models.Tower, nn.Module, vlmtok.Compression]:
    """A model of one's own with a compression, or the refusal as it is."""
    tower, model = models.TOWERS[name], models.fresh(name)
    return tower, model, vlmtok.compress(model, spec)


# ---------------------------------------------------------------------- copies
@pytest.mark.parametrize("name", [*models.TOWERS, "HF LLaVA"])
def test_a_deep_copy_carries_no_hook(name: str) -> None:
    model = models.fresh(name)
    bare = copy.deepcopy(model)
    run = vlmtok.compress(model, "tome:r=4:prop_attn=false" if name in models.TOWERS else "fastv:K=2:keep=0.5")
    before = hooks(model)
    for twin in (
        copy.deepcopy(model),
        copy.deepcopy({"a": [model]})["a"][0],
        copy.deepcopy(copy.deepcopy(model)),
    ):
        assert hooks(twin) == hooks(bare) == {}
        flags = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
        assert not any(getattr(m, flag) for m in twin.modules() for flag in flags)
        if name in models.TOWERS:
            tower = models.TOWERS[name]
            with torch.no_grad():
                assert_same(tower.run(twin, tower.pictures(2)), tower.run(bare, tower.pictures(2)))
    with run.paused():
        assert hooks(copy.deepcopy(model)) == {}
    part = next(m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)))
    assert hooks(copy.deepcopy(part)) == {}
    assert hooks(model) == before, "the model itself keeps its hooks"
    _ended(run)


def _ended(run: vlmtok.Compression) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.remove()


def test_hooks_of_others_are_copied_and_stay() -> None:
    tower, model, run = compressed("timm ViT", "tome:r=4")
    model.blocks[1].register_forward_hook(_Note())
    twin = copy.deepcopy(model)
    assert hooks(twin) == {"blocks.1": 1}
    with torch.no_grad():
        tower.run(twin, tower.pictures(1))
    (note,) = twin.blocks[1]._forward_hooks.values()
    assert note.seen == [models.PATCHES + 1], "the row of the copy is whole"
    _ended(run)


class _Note:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.shape[1])


def test_an_unpickled_model_is_bare_and_can_be_swept() -> None:
    tower, model, run = compressed("timm ViT", "tome:r=4")
    twin = pickle.loads(pickle.dumps(model))
    _ended(run)
    with torch.no_grad():
        assert_same(tower.run(twin, tower.pictures(2)), tower.run(model, tower.pictures(2)))
    vlmtok.remove(twin)
    assert hooks(twin) == {}


def test_a_copy_that_fails_half_way_says_why() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise ValueError("no copies")

    _, model, run = compressed("timm ViT", "tome:r=4")
    model.head_drop = Stubborn()
    with pytest.raises(ValueError, match="no copies"):
        copy.deepcopy(model)
    _ended(run)


# ---------------------------------------------------------------------- TorchScript
def _scriptable(name: str) -> tuple[nn.Module, Tensor]:
    if name == "timm":
        with timm.layers.set_scriptable(True):
            model = models.randomize(timm.create_model("test_vit", pretrained=False))
        return model, models.pictures(1, size=(160, 160))
    return models.fresh(name), models.TOWERS[name].pictures(1)


@pytest.mark.parametrize("name", ["timm", "open_clip VisionTransformer"])
@pytest.mark.filterwarnings("ignore")
def test_torchscript_compiles_what_is_bare_and_refuses_what_is_not(name: str) -> None:
    model, x = _scriptable(name)
    with torch.no_grad():
        wanted = torch.jit.script(model)(x)
        assert_equal(wanted, model(x))
        run = vlmtok.compress(model, "tome:r=4")
        with pytest.raises(UnsupportedModel, match=r"torch\.jit\.script.*run\.remove"):
            torch.jit.script(model)
        with run.paused(), pytest.raises(VlmtokError, match=r"torch\.jit\.script"):
            torch.jit.script(model)
        assert_same(torch.jit.script(copy.deepcopy(model))(x), wanted)
        assert_differs(model(x), wanted)
        run.remove()
        assert_same(torch.jit.script(model)(x), wanted)


def test_a_hook_has_no_name_for_who_can_do_without() -> None:
    _, model, run = compressed("timm ViT", "tome:r=4")
    hook = next(iter(model.blocks[0]._forward_pre_hooks.values()))
    assert getattr(hook, "__name__", None) is None and not hasattr(hook, "__name__")
    assert type(hook).__name__ == "Hook"
    _ended(run)


# ---------------------------------------------------------------------- traces and exports
@pytest.fixture
def one_path() -> Iterator[None]:
    """nn.MultiheadAttention takes another path without gradients; then the bare model fails torch's own check."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize(
    ("name", "spec", "grad"), some(FEW, (*SPECS, "tca:ratio=0.6:update=false"), (False, True), every=5)
)
@pytest.mark.filterwarnings("ignore")
def test_traces_give_what_the_model_gives(one_path: None, name: str, spec: str, grad: bool) -> None:
    try:
        tower, model, run = compressed(name, spec)
    except VlmtokError:
        assert spec.startswith(("crossget", "tca")) and "SigLIP" in name
        return

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return tower.run(self.model, x)

    one, other = tower.pictures(2, seed=1), tower.pictures(2, seed=5)
    with torch.set_grad_enabled(grad), run:
        traced = torch.jit.trace(Running().eval(), one)
        for x in (one, other):
            wanted = model_output = tower.run(model, x)
            assert_equal(traced(x), wanted, 1e-4)
    assert_differs(model_output, tower.run(model, other))


@pytest.mark.parametrize(("name", "spec", "strict"), some(FEW, SPECS, (False, True), every=5))
@pytest.mark.filterwarnings("ignore")
def test_exports_give_what_the_model_gives(name: str, spec: str, strict: bool) -> None:
    try:
        tower, model, run = compressed(name, spec)
    except VlmtokError:
        assert spec.startswith("crossget") and "SigLIP" in name
        return
    plain = model.visual if name == "open_clip CLIP" else model
    one, other = tower.pictures(2, seed=1), tower.pictures(2, seed=5)

    def first(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]

    with torch.no_grad(), run:
        exported = torch.export.export(plain, (one,), strict=strict).module()
        wanted = first(plain(other))
        assert_equal(first(exported(other)), wanted, 1e-4)
    with torch.no_grad():
        bare = first(plain(other))
    assert bare.shape != wanted.shape or (bare - wanted).abs().max() > 1e-3


# ---------------------------------------------------------------------- transforms that hide what hooks must see
def _vmap(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> Any:
    return torch.func.vmap(lambda p: run(model, p[None])[0])(x)


def _by_sample(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> Any:
    return torch.func.vmap(torch.func.grad(lambda p: run(model, p[None]).sum()))(x)


@pytest.mark.parametrize(("name", "spec", "transform"), some(FEW, SPECS, (_vmap, _by_sample), every=3))
def test_vmap_is_refused_in_one_line(name: str, transform: Callable[..., Any], spec: str) -> None:
    tower, model = models.TOWERS[name], models.shared(name)
    x = tower.pictures(2)
    transform(model, tower.run, x)  # bare, it works
    try:
        run = vlmtok.compress(model, spec)
    except VlmtokError:
        assert spec.startswith("crossget") and "SigLIP" in name
        return
    with torch.no_grad(), run:
        wanted = tower.run(model, x)
        with pytest.raises(PassError, match=r"torch\.func\.vmap"):
            transform(model, tower.run, x)
        assert_same(tower.run(model, x), wanted)


@pytest.mark.parametrize("name", ["timm ViT", "open_clip VisionTransformer", "open_clip CLIP"])
def test_symbols_are_refused_in_one_line(name: str) -> None:
    model = models.fresh(name)
    part = model.visual if name == "open_clip CLIP" else model
    torch.fx.symbolic_trace(part)
    run = vlmtok.compress(model, "tome:r=4")
    with pytest.raises(PassError, match=r"torch\.fx"):
        torch.fx.symbolic_trace(part)
    torch.fx.symbolic_trace(copy.deepcopy(part))
    _ended(run)
    torch.fx.symbolic_trace(part)


@pytest.mark.parametrize("spec", ["tome:r=4", "random:keep=0.5"])
@pytest.mark.parametrize("name", FEW)
def test_gradients_by_transform_are_those_of_autograd(name: str, spec: str) -> None:
    tower, model = models.TOWERS[name], models.shared(name)
    x = tower.pictures(2)
    with vlmtok.compress(model, spec):
        found = torch.func.grad(lambda p: tower.run(model, p).square().sum())(x)
        given = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(tower.run(model, given).square().sum(), given)
    assert_equal(found, wanted, 1e-4)


# ---------------------------------------------------------------------- masks
@pytest.mark.parametrize("spec", ["tome:r=4", "tome:r=4:prop_attn=false", "random:keep=0.5"])
def test_a_mask_that_hides_nothing_counts_as_none(spec: str) -> None:
    tower, model = models.TOWERS["HF ViT"], models.shared("HF ViT")
    x = tower.pictures(2)
    mask = torch.ones(2, models.PATCHES + 1, dtype=torch.long)
    with torch.no_grad(), vlmtok.compress(model, spec):
        wanted = tower.run(model, x)
        found = model(pixel_values=x, attention_mask=mask).pooler_output
        assert_same(found, wanted)
        mask[0, 5] = 0
        with pytest.raises(PassError, match="mask"):
            model(pixel_values=x, attention_mask=mask)
        assert_same(tower.run(model, x), wanted)


@pytest.mark.parametrize(
    ("name", "spec"),
    some(("timm ViT", "timm SigLIP", "timm EVA-02"), ("tome:r=4", "tome:r=4:prop_attn=false", PLAIN), every=2),
)
def test_masks_and_causal_calls_of_timm_are_refused(name: str, spec: str) -> None:
    tower, model = models.TOWERS[name], models.shared(name)
    x, length = tower.pictures(2), models.PATCHES + tower.prefix
    calls = {"attn_mask": torch.ones(length, length, dtype=torch.bool).tril(), "is_causal": True}
    for key, value in calls.items():
        try:
            model(x, **{key: value})
        except TypeError:
            continue  # this class takes none
        with torch.no_grad(), vlmtok.compress(model, spec):
            wanted = tower.run(model, x)
            with pytest.raises(PassError, match="mask|causal"):
                model(x, **{key: value})
            assert_same(tower.run(model, x), wanted)


def test_an_export_with_a_mask_stops_where_it_hides_something() -> None:
    tower, model = models.TOWERS["HF ViT"], models.shared("HF ViT")
    x, mask = tower.pictures(2), torch.ones(2, models.PATCHES + 1, dtype=torch.long)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=4"):
        exported = torch.export.export(model, (x,), {"attention_mask": mask}).module()
        assert_equal(exported(x, attention_mask=mask)[0], model(x)[0])
        mask[0, 5] = 0
        with pytest.raises(RuntimeError, match="hides tokens"):
            exported(x, attention_mask=mask)
