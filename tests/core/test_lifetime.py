"""How long a compression lasts: what starts it, ends it, survives it, and what is refused (DESIGN.md 4, Lifetime)."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from support import models
from support.checks import Print, Subject, assert_differs, assert_equal, assert_same, hooks
from torch import nn

import vlmtok
from vlmtok.errors import MissingSignal, ParameterError, PassError, SiteError, UnsupportedModel, VlmtokWarning

# One model of each way in which hooks are placed: timm, rotary, MHA, transformers, a language model.
EVERY = ["timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIP vision", "HF SiglipModel", "HF LLaVA"]
SPEC = {"HF LLaVA": "pitome:ratio=0.8+todre:keep=0.5:tau=0.9"}


def spec_of(name):
    return SPEC.get(name, "tome:r=6")


def methods_of(name):
    return vlmtok.parse_methods(spec_of(name))


@pytest.fixture(params=EVERY)
def subject(request):
    return Subject(request.param, models.fresh(request.param))


@pytest.fixture
def vit():
    return Subject("timm ViT", models.fresh("timm ViT"))


def outputs(subject):
    with torch.no_grad():
        return subject.out()


# ---------------------------------------------------------------------- ends
def test_leaving_with_ends_it(subject):
    before, bare = Print.of(subject.model), outputs(subject)
    with vlmtok.compress(subject.model, methods_of(subject.name)) as run:
        assert run.active
        assert hooks(subject.model)
        assert_differs(outputs(subject), bare)
    assert not run.active
    before.assert_still(subject.model)
    assert_same(outputs(subject), bare)


def test_remove_ends_it_and_may_be_called_again(subject):
    before, bare = Print.of(subject.model), outputs(subject)
    run = vlmtok.compress(subject.model, methods_of(subject.name))
    outputs(subject)
    run.remove()
    run.remove()
    before.assert_still(subject.model)
    assert_same(outputs(subject), bare)


def test_vlmtok_remove_ends_it_without_the_handle(subject):
    before, bare = Print.of(subject.model), outputs(subject)
    vlmtok.compress(subject.model, methods_of(subject.name))
    gc.collect()
    assert_differs(outputs(subject), bare)
    assert vlmtok.remove(subject.model) == 1
    assert vlmtok.remove(subject.model) == 0
    before.assert_still(subject.model)
    assert_same(outputs(subject), bare)


def test_an_exception_in_with_ends_it_quietly(subject):
    before, bare = Print.of(subject.model), outputs(subject)
    with (
        warnings.catch_warnings(),
        pytest.raises(ZeroDivisionError),
        vlmtok.compress(subject.model, methods_of(subject.name)),
    ):
        warnings.simplefilter("error")
        raise ZeroDivisionError
    before.assert_still(subject.model)
    assert_same(outputs(subject), bare)


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_an_exception_inside_the_model_ends_it_right(subject, where):
    """A module of the host raises in the middle of a pass: nothing sticks, the next pass of the same handle works."""
    before, bare = Print.of(subject.model), outputs(subject)
    blocks = blocks_of(subject.model)
    victim = blocks[{"first": 0, "middle": len(blocks) // 2, "last": -1}[where]]

    def boom(*_):
        raise Boom

    run = vlmtok.compress(subject.model, methods_of(subject.name))
    good = outputs(subject)
    handle = victim.register_forward_hook(boom)
    with pytest.raises(Boom):
        outputs(subject)
    handle.remove()
    assert_same(outputs(subject), good, "the pass after an exception and the one before")
    run.remove()
    before.assert_still(subject.model)
    assert_same(outputs(subject), bare)


def blocks_of(model):
    """Blocks of the vision tower, and of a language model behind it."""
    tower = getattr(model, "visual", getattr(model, "vision_model", model))
    return [m for m in tower.modules() if type(m).__name__ in BLOCKS]


BLOCKS = (
    "Block",
    "EvaBlock",
    "ResidualAttentionBlock",
    "CLIPEncoderLayer",
    "SiglipEncoderLayer",
    "LlamaDecoderLayer",
)


def test_installation_that_fails_half_way_leaves_nothing(subject, monkeypatch):
    from vlmtok.core.attachment import Attachment

    before = Print.of(subject.model)
    place, count = Attachment.hook, 0

    def failing(self, *given, **more):
        nonlocal count
        count += 1
        if count > 3:
            raise Boom
        place(self, *given, **more)

    monkeypatch.setattr(Attachment, "hook", failing)
    with pytest.raises(Boom):
        vlmtok.compress(subject.model, methods_of(subject.name))
    assert count == 4
    before.assert_still(subject.model)


# ---------------------------------------------------------------------- stays
def test_an_unassigned_compression_stays_on(subject):
    bare = outputs(subject)
    vlmtok.compress(subject.model, methods_of(subject.name))
    gc.collect()
    assert_differs(outputs(subject), bare)
    vlmtok.remove(subject.model)


def test_a_compressed_model_is_collectable(subject):
    model, name = subject.model, subject.name
    vlmtok.compress(model, methods_of(name))
    outputs(subject)
    found = weakref.ref(model)
    del model, subject.model
    gc.collect()
    assert found() is None, "something keeps the compressed model alive"


def test_the_handle_does_not_keep_the_model_alive(subject):
    run = vlmtok.compress(subject.model, methods_of(subject.name))
    outputs(subject)
    found = weakref.ref(subject.model)
    del subject.model
    gc.collect()
    assert found() is None, "the handle keeps the model alive"
    run.remove()


def test_paused_runs_bare(subject):
    bare = outputs(subject)
    with vlmtok.compress(subject.model, methods_of(subject.name)) as run:
        cut = outputs(subject)
        with run.paused():
            assert_same(outputs(subject), bare)
            with run.paused():
                assert_same(outputs(subject), bare)
            assert_same(outputs(subject), bare)
        assert_same(outputs(subject), cut)
        with pytest.raises(Boom), run.paused():
            raise Boom
        assert_same(outputs(subject), cut)


def test_the_same_model_can_be_compressed_again_and_again(subject):
    bare = outputs(subject)
    found = []
    for _ in range(3):
        with vlmtok.compress(subject.model, methods_of(subject.name)):
            found.append(outputs(subject))
        assert_same(outputs(subject), bare)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_two_models_at_once_do_not_meet():
    one, other = (Subject(name, models.fresh(name)) for name in ("timm ViT", "timm DeiT-3"))
    with vlmtok.compress(one.model, "tome:r=6"):
        alone = outputs(one)
        with vlmtok.compress(other.model, "tome:r=3"):
            both = outputs(other)
            assert_same(outputs(one), alone)
        assert_same(outputs(one), alone)
    with vlmtok.compress(other.model, "tome:r=3"):
        assert_same(outputs(other), both)


def test_one_method_object_serves_two_models():
    """Methods hold settings only."""
    method = vlmtok.parse_methods("transprune")[0]
    one, other = (Subject("HF LLaVA", models.fresh("HF LLaVA")) for _ in range(2))
    with vlmtok.compress(one.model, method):
        alone = outputs(one)
        with vlmtok.compress(other.model, method):
            assert_same(outputs(other), alone)
            assert_same(outputs(one), alone)


# ---------------------------------------------------------------------- refused
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
        ("naflexvit_base_patch16_gap", {}, "mask|position"),
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


# ---------------------------------------------------------------------- handles
def test_a_removed_handle_refuses_with(vit):
    run = vlmtok.compress(vit.model, "tome:r=6")
    outputs(vit)
    run.remove()
    with pytest.raises(PassError, match="removed"), run:
        pass


def test_a_handle_called_as_a_model_says_what_it_is(vit):
    with vlmtok.compress(vit.model, "tome:r=6") as run:
        with pytest.raises(TypeError, match=r"handle.*not the model"):
            run(vit.tower.pictures(1))
        for name in ("generate", "forward", "encode_image", "forward_features", "get_image_features"):
            with pytest.raises(AttributeError, match="handle"):
                getattr(run, name)
        with pytest.raises(AttributeError, match="nonsense"):
            _ = run.nonsense
        assert "tome" in repr(run)
        outputs(vit)


def test_hooks_that_never_ran_warn(subject):
    """2: it fired."""
    run = vlmtok.compress(subject.model, methods_of(subject.name))
    with pytest.warns(VlmtokWarning, match="never ran"):
        run.remove()
    with pytest.warns(VlmtokWarning, match="never ran"), vlmtok.compress(subject.model, methods_of(subject.name)):
        pass
    vlmtok.compress(subject.model, methods_of(subject.name))
    with pytest.warns(VlmtokWarning, match="never ran"):
        vlmtok.remove(subject.model)


def test_hooks_that_ran_do_not_warn(subject):
    with warnings.catch_warnings():
        warnings.simplefilter("error", VlmtokWarning)
        with vlmtok.compress(subject.model, methods_of(subject.name)):
            outputs(subject)


def test_what_methods_learn_is_reached_through_the_handle(vit):
    before = Print.of(vit.model)
    with vlmtok.compress(vit.model, "crossget:guidance=cross:rv=4") as run:
        learned = dict(run.named_parameters())
        assert learned
        assert {id(p) for p in run.parameters()}.isdisjoint({id(p) for p in vit.model.parameters()})
        before = Print.of(vit.model)
        first = outputs(vit)
        with torch.no_grad():
            for p in run.parameters():
                p.add_(torch.randn_like(p))
        assert_differs(outputs(vit), first, 1e-4)
        state = run.state_dict()
        changed = outputs(vit)
    with vlmtok.compress(vit.model, "crossget:guidance=cross:rv=4") as run:
        run.load_state_dict(state)
        assert_same(outputs(vit), changed)
    assert list(vit.model.state_dict()) == list(before.state)


# ---------------------------------------------------------------------- copies, files
def test_a_deep_copy_is_bare_and_swept_by_the_next_compress(subject):
    bare = outputs(subject)
    with vlmtok.compress(subject.model, methods_of(subject.name)):
        cut = outputs(subject)
        twin = Subject(subject.name, copy.deepcopy(subject.model))
        assert_same(outputs(twin), bare)
        with vlmtok.compress(twin.model, methods_of(subject.name)):
            assert_same(outputs(twin), cut)
        twin = twin.model
        assert not hooks(twin)
        assert_same(outputs(subject), cut)
    inert = copy.deepcopy(subject.model)
    assert not hooks(inert)


def test_vlmtok_remove_sweeps_a_copy(vit):
    with vlmtok.compress(vit.model, "tome:r=6"):
        outputs(vit)
        twin = copy.deepcopy(vit.model)
    assert vlmtok.remove(twin) == 0
    assert not hooks(twin)


def test_saved_models_load_bare(vit):
    """Pickled and saved whole models carry inert hooks at most."""
    bare = outputs(vit)
    with vlmtok.compress(vit.model, "tome:r=6"):
        outputs(vit)
        file = io.BytesIO()
        torch.save(vit.model, file)
        text = pickle.dumps(vit.model)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=False), pickle.loads(text)):
        twin = Subject("timm ViT", loaded)
        assert_same(outputs(twin), bare)
        with vlmtok.compress(loaded, "tome:r=6"):
            assert_differs(outputs(twin), bare)
        assert not hooks(loaded)


def test_state_dicts_load_into_a_compressed_model(subject):
    bare = outputs(subject)
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    with vlmtok.compress(subject.model, methods_of(subject.name)):
        cut = outputs(subject)
        assert list(subject.model.state_dict()) == list(state)
        subject.model.load_state_dict(state)
        assert_same(outputs(subject), cut)
    assert_same(outputs(subject), bare)


def test_save_pretrained_writes_what_it_wrote_before(tmp_path):
    model = models.fresh("HF CLIP vision")
    x = models.pictures(1)
    with torch.no_grad():
        bare = model(pixel_values=x).pooler_output
    with vlmtok.compress(model, "tome:r=6"):
        model(pixel_values=x)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": loaded.config._name_or_path}
    with torch.no_grad():
        assert_same(loaded(pixel_values=x).pooler_output, bare)


# ---------------------------------------------------------------------- entry points
ENTRIES = {
    "timm ViT": ("forward_features", lambda m, x: m.forward_features(x)[:, 0]),
    "open_clip CLIP": ("encode_image", lambda m, x: m.encode_image(x)),
    "open_clip CoCa": ("encode_image", lambda m, x: m.encode_image(x)),
    "HF CLIPModel": ("get_image_features", lambda m, x: m.get_image_features(pixel_values=x).pooler_output),
    "HF LLaVA": ("get_image_features", lambda m, x: torch.stack(m.get_image_features(x).pooler_output)),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_direct_entry_points_work_also_right_after_an_exception(name):
    """There is no outermost hook: a pass starts at block 0."""
    _, enter = ENTRIES[name]
    model = models.fresh(name)
    x = models.pictures(2, size=(32, 32) if name == "HF LLaVA" else (48, 48))
    blocks = blocks_of(model)

    def boom(*_):
        raise Boom

    with torch.no_grad():
        bare = enter(model, x)
        with vlmtok.compress(model, "pitome:ratio=0.8"):
            good = enter(model, x)
            assert_differs(good[:, : bare.shape[1]], bare)
            for victim in (blocks[0], blocks[1]):
                handle = victim.register_forward_hook(boom)
                with pytest.raises(Boom):
                    enter(model, x)
                handle.remove()
                assert_same(enter(model, x), good)
                assert_equal(enter(model, x[:1]), good[:1])
        assert_same(enter(model, x), bare)


def test_encode_text_and_the_text_tower_are_left_alone():
    open_clip, hf = models.fresh("open_clip CLIP"), models.fresh("HF CLIPModel")
    ids = torch.tensor([[1, 5, 9, 63, 0, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        bare = open_clip.encode_text(ids), hf.get_text_features(input_ids=ids).pooler_output
        with vlmtok.compress(open_clip, "tome:r=4"), vlmtok.compress(hf, "tome:r=4"):
            found = open_clip.encode_text(ids), hf.get_text_features(input_ids=ids).pooler_output
            open_clip.encode_image(models.pictures(1))
            hf.get_image_features(pixel_values=models.pictures(1))
    assert torch.equal(bare[0], found[0])
    assert torch.equal(bare[1], found[1])


def test_a_lone_block_is_refused_outside_a_pass(vit):
    with vlmtok.compress(vit.model, "tome:r=4"):
        with pytest.raises(PassError, match="block 0"):
            vit.model.blocks[2](torch.randn(1, 37, 32))
        outputs(vit)


def test_blocks_out_of_order_are_refused(vit):
    with torch.no_grad(), vlmtok.compress(vit.model, "tome:r=4"):
        outputs(vit)
        for layer in (1, 3):  # an earlier one, and the last one again
            with pytest.raises(PassError, match=rf"block {layer} .*behind block 3"):
                vit.model.blocks[layer](torch.randn(1, 37, 32))
        outputs(vit)


def test_intermediate_layers_can_be_read_as_rows(vit):
    """forward_intermediates gives shrinking lists; a grid cannot be made of them."""
    x = vit.tower.pictures(2)
    with torch.no_grad(), vlmtok.compress(vit.model, "tome:r=4"):
        final, layers = vit.model.forward_intermediates(x, output_fmt="NLC")
        assert [layer.shape[1] for layer in layers] == [32, 28, 24, 20]
        assert_same(final, vit.model.forward_features(x))


# ---------------------------------------------------------------------- threads
def in_thread(call):
    found = []

    def work():
        try:
            found.append(call())
        except BaseException as problem:
            found.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_pass_may_run_in_any_thread(subject):
    with torch.no_grad(), vlmtok.compress(subject.model, methods_of(subject.name)):
        good = outputs(subject)
        assert_same(in_thread(lambda: outputs(subject)), good)
        assert_same(outputs(subject), good)


def test_a_block_from_another_thread_is_refused(subject):
    """In the middle of a pass a second thread runs one of its blocks."""
    found, open_ = [], True

    def intrude(module, args, kwargs):
        nonlocal open_
        if open_:
            open_ = False
            found.append(in_thread(lambda: module(*args, **kwargs)))

    with vlmtok.compress(subject.model, methods_of(subject.name)):
        good = outputs(subject)
        handle = blocks_of(subject.model)[1].register_forward_pre_hook(intrude, with_kwargs=True, prepend=True)
        result = outputs(subject)
        handle.remove()
        assert isinstance(found[0], PassError), found[0]
        assert "thread" in str(found[0])
        assert_same(result, good, "the pass that was disturbed and one that was not")
        assert_same(outputs(subject), good)


def test_a_second_thread_in_the_middle_of_a_pass_never_mixes(vit):
    """Two passes that overlap: each belongs to its thread, and both are right."""
    x = vit.tower.pictures(3)
    with vlmtok.compress(vit.model, "tome:r=6"):
        good = outputs(vit)
        other = []

        def intrude(module, args):
            if not other:
                other.append(None)
                other[0] = in_thread(lambda: vit.model(x[:1]).detach())

        handle = vit.model.blocks[2].register_forward_pre_hook(intrude, prepend=True)
        with torch.no_grad():
            mine = vit.model(x)
        handle.remove()
        assert_equal(mine, good)
        assert_equal(other[0], good[:1])
        assert_same(outputs(vit), good)


def test_two_copies_serve_two_threads(vit):
    twins = [copy.deepcopy(vit.model) for _ in range(2)]
    for twin in twins:
        vlmtok.compress(twin, "tome:r=6")
    with torch.no_grad():
        alone = [vit.out(twin) for twin in twins]
    found = {}

    def work(at):
        with torch.no_grad():
            for _ in range(20):
                found.setdefault(at, []).append(vit.out(twins[at]))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(2):
        assert len(found[at]) == 20
        assert all(torch.equal(result, alone[at]) for result in found[at])


# ---------------------------------------------------------------------- torch.compile
@pytest.fixture
def dynamo():
    import torch._dynamo as dynamo

    dynamo.reset()
    yield dynamo
    dynamo.reset()


@pytest.fixture
def short():
    """Two blocks: what is compiled is compiled six times."""
    return Subject("timm ViT", models.short_vit())


WAYS = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
    "a compiled function around the model": lambda model: torch.compile(lambda x: model(x) * 1.0, backend="eager"),
    "each block compiled": lambda model: [block.compile(backend="eager") for block in model.blocks] and model,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_compile_remove_attach_is_right_or_raises(short, dynamo, way):
    """Dynamo does not see hooks come or go; whatever the order, results are right."""
    x = short.tower.pictures(2)
    with torch.no_grad():
        bare = short.model(x)
        with vlmtok.compress(short.model, "tome:r=6"):
            cut = short.model(x)
        call = WAYS[way](short.model)
        assert_equal(call(x), bare, what="compiled bare")
        run = vlmtok.compress(short.model, "tome:r=6")
        assert_equal(call(x), cut, what="compiled bare, then compressed")
        run.remove()
        assert_equal(call(x), bare, what="and removed")
        run = vlmtok.compress(short.model, "tome:r=3")
        with_three = call(x)
        assert_differs(with_three, cut)
        run.remove()
        assert_equal(call(x), bare, what="and removed again")
        with vlmtok.compress(short.model, "tome:r=6"):
            assert_equal(call(x), cut, what="and compressed again")


@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_compiled_while_attached_then_removed(short, dynamo):
    x = short.tower.pictures(2)
    with torch.no_grad():
        bare = short.model(x)
        run = vlmtok.compress(short.model, "tome:r=6")
        cut = short.model(x)
        call = torch.compile(short.model, backend="eager")
        assert_equal(call(x), cut)
        with run.paused():
            assert_equal(call(x), bare, what="paused")
        assert_equal(call(x), cut)
        run.remove()
        assert_equal(call(x), bare, what="removed")


@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_a_compiled_model_can_be_compressed_itself(short, dynamo):
    x = short.tower.pictures(2)
    call = torch.compile(short.model, backend="eager")
    with torch.no_grad():
        bare = call(x)
        with vlmtok.compress(call, "tome:r=6"):
            assert_differs(call(x), bare)
        assert_equal(call(x), bare)


def test_attaching_to_compiled_code_is_said(short, dynamo):
    call = torch.compile(short.model, backend="eager")
    with torch.no_grad():
        call(short.tower.pictures(1))
    with pytest.warns(VlmtokWarning, match="compiled"):
        run = vlmtok.compress(short.model, "tome:r=6")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.remove()
