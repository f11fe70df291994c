"""What is refused: two compressions in one place, models, methods, layers, signals and answers that cannot be."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support import models
from support.checks import Print, Subject, assert_differs, assert_same, hooks
from support.lifetimes import Boom, methods_of, outputs
from torch import nn

import vlmtok
from vlmtok.errors import MissingSignal, ParameterError, SiteError, UnsupportedModel


def test_a_second_compression_at_the_same_site_is_refused(subject):
    with vlmtok.compress(subject.model, methods_of(subject.name)) as run:
        good, placed = outputs(subject), hooks(subject.model)
        with pytest.raises(SiteError, match=r"wants to act at .* of another compression .*remove"):
            vlmtok.compress(subject.model, methods_of(subject.name))
        assert hooks(subject.model) == placed
        assert run.active
        assert_same(outputs(subject), good)


def together(model, specs, call):
    """What one list of methods gives."""
    with torch.no_grad(), vlmtok.compress(model, "+".join(specs)):
        return call()


PAIRS = {
    "timm ViT": ("random:keep=0.8:stage=vision:layer=0", "random:keep=0.7:stage=vision:layer=2"),
    "HF LLaVA": ("pitome:ratio=0.8", "todre:keep=0.5:tau=0.9"),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backwards", [False, True])
def test_compressions_at_different_sites_act_as_one_list(name, backwards):
    subject = Subject(name, models.fresh(name))
    before, bare = Print.of(subject.model), outputs(subject)
    specs = PAIRS[name][::-1] if backwards else PAIRS[name]
    alone = [together(subject.model, [spec], subject.out) for spec in specs]
    both = together(subject.model, specs, subject.out)
    one = vlmtok.compress(subject.model, specs[0])
    assert_same(outputs(subject), alone[0])
    other = vlmtok.compress(subject.model, specs[1])
    assert one.active
    assert other.active
    assert_same(outputs(subject), both)
    with one.paused():
        assert_same(outputs(subject), bare)
    one.remove()
    assert not one.active
    assert_same(outputs(subject), alone[1], "what is left after the first was removed")
    again = vlmtok.compress(subject.model, specs[0])
    assert_same(outputs(subject), both)
    other.remove()
    assert_same(outputs(subject), alone[0])
    again.remove()
    before.assert_still(subject.model)
    assert_same(outputs(subject), bare)


def test_one_of_two_compressions_that_fails_leaves_the_other(vit):
    specs = PAIRS["timm ViT"]
    with vlmtok.compress(vit.model, specs[0]):
        alone = outputs(vit)
        for bad, error in (("random:stage=vision:layer=9", SiteError), ("fastv", SiteError), (specs[0], SiteError)):
            with pytest.raises(error):
                vlmtok.compress(vit.model, bad)
            assert_same(outputs(vit), alone)
        with pytest.raises(Boom), vlmtok.compress(vit.model, specs[1]):
            outputs(vit)
            raise Boom
        assert_same(outputs(vit), alone)
    assert not hooks(vit.model)


def test_vlmtok_remove_ends_all(vit):
    bare = outputs(vit)
    for spec in PAIRS["timm ViT"]:
        vlmtok.compress(vit.model, spec)
    outputs(vit)
    assert vlmtok.remove(vit.model) == 2
    assert not hooks(vit.model)
    assert_same(outputs(vit), bare)


@pytest.mark.parametrize("of", ["bare", "compressed"])
def test_a_tower_inside_a_language_model_is_refused_and_nothing_changes(of):
    """Its features go to places that are counted; the whole is what can be compressed."""
    subject = Subject("HF LLaVA", models.fresh("HF LLaVA"))
    model, bare = subject.model, outputs(subject)
    with vlmtok.compress(model, "todre:keep=0.5") if of == "compressed" else contextlib.nullcontext():
        before, placed = outputs(subject), hooks(model)
        with pytest.raises(UnsupportedModel, match="compress the whole"):
            vlmtok.compress(model.model.vision_tower, "tome:r=2")
        assert hooks(model) == placed
        assert_same(outputs(subject), before)
    assert not hooks(model)
    assert_same(outputs(subject), bare)


def test_a_method_that_names_a_site_twice_is_refused(vit):
    class Twice(vlmtok.Random):
        def sites(self, layout):
            return [vlmtok.Site("vision", 1), vlmtok.Site("vision", 1)]

    with pytest.raises(SiteError, match="same site twice"):
        vlmtok.compress(vit.model, Twice())
    assert not hooks(vit.model)


def test_two_methods_of_one_list_may_share_a_site(vit):
    bare = outputs(vit)
    with vlmtok.compress(vit.model, "tome:r=4+pitome:ratio=0.8") as run:
        assert_differs(outputs(vit), bare)
        assert vit.model.forward_features(vit.tower.pictures(1)).shape[1] < 37 - 4 * 4
    assert not run.active


def test_nothing_to_do_is_said(vit):
    for spec in ("tome:r=0", "pitome:ratio=1.0"):
        with pytest.raises(SiteError, match="nothing to do"):
            vlmtok.compress(vit.model, spec)
    assert not hooks(vit.model)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Linear(2, 2), "Linear"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential"),
        (object(), "torch.nn.Module"),
        (None, "torch.nn.Module"),
        ("vit_base_patch16_224", "torch.nn.Module"),
    ],
)
def test_what_no_adapter_carries_is_said(model, named):
    with pytest.raises(UnsupportedModel, match=named):
        vlmtok.compress(model, "tome")


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("beit_base_patch16_224", {}, "relative position bias"),
        ("swin_tiny_patch4_window7_224", {}, "window"),
        ("samvit_base_patch16", {}, "window|grid"),
        ("vit_relpos_small_patch16_224", {}, "relative position"),
        ("cait_xxs24_224", {}, "talking heads|class attention"),
        ("xcit_nano_12_p16_224", {}, "channels"),
        ("hiera_tiny_224", {}, "pool"),
        ("vit_small_patch16_36x1_224", {}, "Parallel|blocks are"),
        ("resnet18", {}, "no adapter carries"),
    ],
)
def test_models_that_cannot_be_carried_say_why(name, changes, why):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **changes)
    if "36x1" in name:
        import timm.models.vision_transformer as vt

        with torch.device("meta"):
            model = vt.VisionTransformer(embed_dim=16, depth=1, num_heads=2, block_fn=vt.ParallelScalingBlock)
    with pytest.raises(UnsupportedModel, match=why):
        vlmtok.compress(model, "tome")
    assert not hooks(model)


def test_data_parallel_is_refused(vit):
    with pytest.raises(UnsupportedModel, match="threads"):
        vlmtok.compress(nn.DataParallel(vit.model), "tome")


@pytest.mark.parametrize("method", [vlmtok.ToMe, "", [], 3, None, [None], ["tome", 3]])
def test_what_is_no_method_is_said(vit, method):
    with pytest.raises((ParameterError, ValueError)):
        vlmtok.compress(vit.model, method)
    assert not hooks(vit.model)


def test_layers_that_do_not_exist_are_said(vit):
    for layer in (4, 7, -5):
        with pytest.raises(SiteError, match=r"layer.*does not exist.*0 to 3"):
            vlmtok.compress(vit.model, vlmtok.Random(stage="vision", layer=layer))
    llava = models.shared("HF LLaVA")
    with pytest.raises(SiteError, match="0 to 15"):
        vlmtok.compress(llava, "fastv:K=40")
    with pytest.raises(SiteError, match=r"layer 0 start.*projected"):
        vlmtok.compress(llava, vlmtok.Random(stage="decoder", layer=0))

    class Last(vlmtok.Random):
        def sites(self, layout):
            return [vlmtok.Site("decoder", 15, "end")]

    with pytest.raises(SiteError, match="layer 15 end"):
        vlmtok.compress(llava, Last())

    class Mid(vlmtok.Random):
        def sites(self, layout):
            return [vlmtok.Site("decoder", 3, "mid")]

    with pytest.raises(SiteError, match=r"mid.*offers"):
        vlmtok.compress(llava, Mid())
    assert not hooks(vit.model)
    assert not hooks(llava)


@pytest.mark.parametrize(
    "need",
    [
        "nonsense",
        "text",
        "keys@text:0",
        "keys@vision:9",
        "keys@vision:3",
        "cls_attention@decoder:0",
        "a b",
        "keys@vision",
    ],
)
def test_signals_that_cannot_be_given_are_said(vit, need):
    class Asks(vlmtok.Random):
        def sites(self, layout):
            return [vlmtok.Site("vision", 1, "mid", (need,))]

    with pytest.raises(MissingSignal, match="Asks"):
        vlmtok.compress(vit.model, Asks())
    assert not hooks(vit.model)


@pytest.mark.filterwarnings("ignore:the hooks of wrong never ran")
def test_a_method_that_answers_nonsense_is_said(vit):
    class Wrong(vlmtok.Random):
        def reduce(self, view):
            return answers[0]

    n = 36
    for answer in (
        "keep everything",
        torch.arange(4),
        vlmtok.Reduction(torch.arange(4).expand(1, 4)),
        vlmtok.Reduction(torch.arange(n + 1).expand(3, n + 1)),
        vlmtok.Reduction(torch.zeros(3, 0, dtype=torch.int64)),
        vlmtok.Reduction(torch.arange(4).expand(3, 4), valid=torch.ones(3, 4, dtype=torch.bool)),
    ):
        answers = [answer]
        with vlmtok.compress(vit.model, Wrong()), pytest.raises(ParameterError, match="Wrong"):
            outputs(vit)
    assert not hooks(vit.model)
