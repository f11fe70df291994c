"""Contract 3 and 4: a batch equals its rows, every patch has one owner or none; shapes without data."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cells import RUNS, ids, made, subject_of
from support.checks import assert_differs, assert_equal, watched
from support.methods import cuts

import vlmtok
from vlmtok import Reduction, TokenView


# ---------------------------------------------------------------------- 3: rows do not meet
@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_a_batch_equals_its_rows(method, model):
    """3: also left-padded rows, rows with two pictures, one or none."""
    subject = subject_of(method, model)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, made(method)):
            whole = subject.out()
            for row in range(subject.rows):
                assert_equal(subject.row_of(whole, row), subject.out(row=row), what=f"row {row} in a batch and alone")
    assert_differs(whole, bare)


# ---------------------------------------------------------------------- 4: every patch has one owner or none
def owner_by_hand(reduction: Reduction, row: int, n: int) -> list[int]:
    owner = [-1] * n
    real = [True] * reduction.slots if reduction.valid is None else reduction.valid[row].tolist()
    for slot, token in enumerate(reduction.keep[row].tolist()):
        if real[slot]:
            owner[token] = slot
    if reduction.src is not None and reduction.dst is not None:
        kept = {token for token, is_real in zip(reduction.keep[row].tolist(), real) if is_real}
        for token, slot in zip(reduction.src[row].tolist(), reduction.dst[row].tolist()):
            if slot >= 0 and owner[token] < 0 and token not in kept:
                owner[token] = slot
    return owner


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_patches_are_owned_once_and_mass_is_kept(method, model):
    """4, and `count` tells what `reduce` returns, and `reduce` runs on meta tensors with the same shapes."""
    subject = subject_of(method, model)
    methods = made(method)
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(subject.model, methods):
        subject.out()
    assert seen and any(s.reduction is not None for s in seen) == cuts(method)
    for s in seen:
        view, reduction = s.view, s.reduction
        batch, n, _ = view.tokens.shape
        count = s.method.count(view.counts)
        if reduction is None:
            assert count in (None, n), f"count says {count} of {n}, and reduce left all"
            continue
        assert count in (None, reduction.slots), f"count says {count}, reduce made {reduction.slots} slots of {n}"
        protected = s.signals.get("protected")
        spare = 0 if view.site.stage != "features" or protected is None else protected.shape[1]
        size = torch.ones(batch, n) if view.size is None else view.size
        tokens = torch.cat([view.tokens, protected], 1) if spare else view.tokens
        slots, sizes = reduction.apply(view.tokens, size, protected if spare else None)
        size = torch.cat([size, torch.zeros(batch, spare)], 1)
        owner = reduction.assignment(n + spare)
        real = torch.ones(batch, reduction.slots, dtype=torch.bool) if reduction.valid is None else reduction.valid
        for row in range(batch):
            keep = reduction.keep[row].tolist()
            assert len(set(keep)) == len(keep), f"a token represents two slots: {keep}"
            assert owner[row].tolist() == owner_by_hand(reduction, row, n + spare)
        owned = torch.zeros(batch, reduction.slots + 1)
        owned.scatter_add_(1, torch.where(owner < 0, reduction.slots, owner), size)
        assert_equal(sizes * real, owned[:, :-1] * real, what="sizes of the slots and what they own")
        assert_equal((sizes * real).sum(1) + owned[:, -1], size.sum(1), what="patches before and after")
        if reduction.keep_weight is None and bool((owner >= 0).all()) and not spare:
            before = (tokens.double() * size[..., None].double()).sum(1)
            assert_equal((slots.double() * sizes[..., None].double()).sum(1), before, what="mass before and after")


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_reduce_runs_on_meta_tensors(method, model):
    """Its own cost is counted that way; shapes must be those of the real run."""
    subject = subject_of(method, model)
    methods = made(method)
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(subject.model, methods) as run:
        subject.out()
    memories = {id(method): run.memory(at) for at, method in enumerate(methods)}
    for s in seen:
        view, memory = s.view, memories[id(s.method)]
        again = TokenView(
            view.tokens.to("meta"),
            view.site,
            size=None if view.size is None else view.size.to("meta"),
            num_prefix=view.num_prefix,
            depth=view.depth,
            grid=view.grid,
            entered=view.entered,
            signals=on_meta(s.signals),
            state=on_meta(s.state),
            row=on_meta(s.row),
            memory=None if memory is None else copy.deepcopy(memory).to("meta"),
            frames=view.frames,
            cells=view.cells,
        )
        with torch.no_grad():
            found = s.method.reduce(again)
        assert (found is None) == (s.reduction is None)
        if found is not None and s.reduction is not None:
            for name in ("keep", "src", "dst", "keep_weight", "src_weight", "valid"):
                one, other = getattr(found, name), getattr(s.reduction, name)
                assert (one is None) == (other is None), name
                assert one is None or (one.shape == other.shape and one.device.type == "meta"), name


def on_meta(held):
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in held.items()}
