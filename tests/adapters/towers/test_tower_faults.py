"""Towers that are not quite what a row was written for: other attention, wrapped classes, other forwards."""

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
from support.tower_specs import spec_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from vlmtok.adapters import forms
from vlmtok.adapters.base import child

import vlmtok
from vlmtok.errors import MissingSignal, UnsupportedModel, VlmtokError
from vlmtok.lab.tiny.towers import timm_vit

SIGNALLED = ("tome:r=4:prop_attn=false", "crossget:rv=6", "tca:ratio=0.6:update=false")
PLAIN = "random:keep=0.5"


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


@pytest.mark.parametrize(
    "name", ["HF CLIP vision", "HF SigLIP vision", "HF ViT", "HF DINOv2", "HF BLIP-2 vision", "HF CLIPModel"]
)
def test_attention_functions_of_transformers(name: str) -> None:
    """Flash and flex attention are the same function of q and k; what else is registered may be anything."""
    from transformers import AttentionInterface

    AttentionInterface.register("somebodys", lambda *args, **kwargs: None)
    model = models.fresh(name)
    for kind, signals in (("somebodys", False), ("flash_attention_2", True), ("flex_attention", True)):
        for attn in attentions(model):
            attn.config._attn_implementation = kind
        if kind == "flex_attention":
            vlmtok.compress(model, "tome:r=4").remove()
        else:
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


BY_NAME = {
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "aya_vision", "aria", "vipllava"),
    "deepseek_vl_hybrid",
}
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
@pytest.mark.parametrize("name", ["timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIPModel", "HF BLIP-2 vision"])
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
