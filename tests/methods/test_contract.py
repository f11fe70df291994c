"""What is always true , for every method of the registry on every model.

`matrix.json` says what runs and what is refused and why. A new method or model needs no line here: write the table
anew with ``python -m support.matrix`` and look at the difference.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support import matrix, models
from support.cells import EXPECTED, REFUSED, RUNS, ids, made, subject_of
from support.checks import Print, Subject, assert_differs, assert_equal, assert_same, hooks, idle
from support.matrix import spec_of
from support.methods import on_caches

import vlmtok
from vlmtok.errors import VlmtokError

KEEP_ALL = {
    "averagepool": "averagepool:output_size=(4;4)",
    "cdpruner": "cdpruner:keep=1.0",
    **{name: f"{name}:keep=1.0" for name in ("dart", "fastervlm", "grid", "hiprune", "holov", "mmtok", "vispruner")},
    **{name: f"{name}:keep=1.0" for name in vlmtok.list_methods() if on_caches(name)},
    "divprune": "divprune:keep=1.0",
    "fastv": "fastv:keep=1.0",
    "learned": "learned:keep=1.0",
    "pyramiddrop": "pyramiddrop:ratios=(1.0;1.0;1.0)",
    "random": "random:keep=1.0",
    "scope": "scope:keep=1.0",
    "todre": "todre:keep=1.0:tau=0",
    "transprune": "transprune:ratios=(1.0;1.0;1.0)",
    "visionzip": "visionzip:keep=1.0",
}
"""Settings that keep every token, of the methods that have such settings and then still visit their sites."""


# ---------------------------------------------------------------------- the table
def test_the_table_has_every_method_and_every_model():
    assert sorted(EXPECTED) == vlmtok.list_methods(), "methods came or went: run python -m support.matrix"
    for method, row in EXPECTED.items():
        assert sorted(row) == sorted(models.BUILDERS), f"models came or went for {method}: run python -m support.matrix"


def test_the_table_has_the_size_that_was_looked_at():
    assert (len(EXPECTED), len(models.BUILDERS), len(RUNS), len(REFUSED)) == (37, 33, 289, 932)


@pytest.mark.parametrize(("method", "model"), REFUSED, ids=ids(REFUSED))
def test_refused_before_anything_is_changed(method, model):
    """9: says what was asked and what was found, and leaves the model alone."""
    found = models.shared(model)
    before = Print.of(found)
    with pytest.raises(VlmtokError) as refusal:
        vlmtok.compress(found, made(method))
    kind, message = type(refusal.value).__name__, str(refusal.value)
    assert f"refused: {kind}: {matrix.reason(message)}" == EXPECTED[method][model]
    assert type(made(method)[0]).__name__ in message, f"the message does not say who asks: {message}"
    before.assert_still(found)


def test_the_contract_subjects_are_what_they_say():
    """The batch of LLaVA has padding, two pictures, one, and none."""
    batch = Subject("HF LLaVA").batch
    assert sorted(0 if p is None else len(p) for p in batch.pixels) == [0, 1, 1, 2]
    assert len({len(row) for row in batch.rows}) == 4


# ---------------------------------------------------------------------- 1: bit-identical where nothing is done
@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_a_method_that_does_nothing_changes_no_bit(method, model):
    """1: None at every site, with every signal derived and nothing inserted."""
    subject = subject_of(method, model)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, idle(spec_of(method))) as run:
            found = subject.out()
        assert run._attachment.ledger.fired, "no site was visited"
        assert_same(found, bare)


KEPT = [cell for cell in RUNS if cell[0] in KEEP_ALL]


@pytest.mark.parametrize(("method", "model"), KEPT, ids=ids(KEPT))
def test_keeping_all_changes_no_bit(method, model):
    subject = subject_of(method, model)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, KEEP_ALL[method]):
            assert_same(subject.out(), bare)


def test_every_method_that_can_keep_all_is_in_the_list():
    """`keep` as a share has a keep-all setting by definition."""
    for name in vlmtok.list_methods():
        settings = vlmtok.create_method(name).settings()
        if isinstance(settings.get("keep"), (int, float)):
            assert name in KEEP_ALL


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_the_exact_model_comes_back(method, model):
    """1: after removal, after an exception in the middle of a forward, and in a deep copy. 2: it fired."""
    subject = subject_of(method, model)
    before = Print.of(subject.model)
    methods = made(method)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, methods) as run:
            first = subject.out()
            twin = copy.deepcopy(subject.model)
            assert_same(subject.out(twin), bare, "a deep copy and the bare model")
        assert run._attachment.ledger.fired
        assert_differs(first, bare)
        before.assert_still(subject.model)
        assert_same(subject.out(), bare, "output after removal and before")

        calls = []

        def fail(view):
            calls.append(view)
            raise RuntimeError("made to fail")

        methods[0].__dict__["reduce"] = fail
        try:
            with pytest.raises(RuntimeError, match="made to fail"), vlmtok.compress(subject.model, methods):
                subject.out()
        finally:
            del methods[0].__dict__["reduce"]
        assert calls
        before.assert_still(subject.model)
        assert_same(subject.out(), bare, "output after an exception and before")

        with vlmtok.compress(subject.model, methods):
            assert_same(subject.out(), first, "the same compression again")
    # The copy carries inert hooks until it is compressed itself.
    with torch.no_grad(), vlmtok.compress(twin, methods):
        assert_same(subject.out(twin), first, "the copy, compressed")
    assert not hooks(twin)


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_an_exception_inside_a_forward_leaves_the_next_one_right(method, model):
    """Nothing of a broken pass reaches the one after it, in the same compression."""
    subject = subject_of(method, model)
    methods = made(method)
    with torch.no_grad(), vlmtok.compress(subject.model, methods) as run:
        first = subject.out()
        run.reset()
        visits = 0

        def fail(view):
            nonlocal visits
            visits += 1
            if visits > 1:
                raise RuntimeError("made to fail")
            return type(methods[0]).reduce(methods[0], view)

        methods[0].__dict__["reduce"] = fail
        try:
            subject.out()
        except RuntimeError:
            pass
        finally:
            del methods[0].__dict__["reduce"]
        run.reset()
        assert_same(subject.out(), first)
        # Another batch, another shape.
        assert_equal(subject.out(row=0), subject.row_of(first, 0))
