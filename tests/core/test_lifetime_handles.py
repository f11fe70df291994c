"""Handles of a compression, and copies and files of a compressed model."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from support import models
from support.checks import Print, Subject, assert_differs, assert_same, hooks
from support.lifetimes import methods_of, outputs

import vlmtok
from vlmtok.errors import PassError, VlmtokWarning


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
