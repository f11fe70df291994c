"""How long a compression lasts: what ends it and what survives it (rules 2 and 4)."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from support import models
from support.checks import Print, Subject, assert_differs, assert_same, hooks
from support.lifetimes import Boom, blocks_of, methods_of, outputs

import vlmtok


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
