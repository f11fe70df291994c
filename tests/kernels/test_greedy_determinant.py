"""Definition of the choice by determinants, against projections in double precision; its two paths; halves."""

import naive
import pytest
import torch
from drawn import rows
from support import referee

from vlmtok import kernels
from vlmtok.kernels import reference
from vlmtok.kernels.reference import determinant, determinant_rows


def factors(batch, n, seed=1):
    return rows(batch, n, 1, seed=seed)[..., 0].abs() + 0.1


def both(*args, **settings):
    """What the op gives by itself, and what it gives where something counts, which takes the plain rounds."""
    found = kernels.greedy_determinant(*args, **settings)
    with referee.counter():
        plain = kernels.greedy_determinant(*args, **settings)
    return found, plain


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_greedy_determinant(weighted, masked):
    x = rows(2, 14, 20)
    x[1, 4], x[0, 7], x[0, 9], x[1, 2, 3] = float("nan"), 0, x[0, 3], float("inf")
    relevance = factors(2, 14) if weighted else None
    valid = torch.rand(2, 14, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    for k in (0, 1, 5, 14):
        order, gain = naive.greedy_determinant(x, k, relevance, valid)
        for found in both(x, k, relevance=relevance, valid=valid):
            assert torch.equal(found[0], order) and found[1].dtype == torch.float32
            torch.testing.assert_close(found[1], gain, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_factors_that_are_no_factors():
    """NaN and what is negative counts as 0: behind all that gain, before what is spanned. Infinity comes first."""
    x = torch.eye(8)[:7].unsqueeze(0).clone()
    x[0, 6] = x[0, 5]
    relevance = torch.tensor([[float("nan"), -5.0, float("inf"), -0.0, 1e-30, 2.0, 3.0]])
    for order, gain in both(x, 7, relevance=relevance):
        assert order.tolist() == [[2, 6, 0, 1, 3, 4, 5]]
        assert gain[0, 0].isinf() and gain[0, 1:6].tolist() == [9, 0, 0, 0, 0] and gain[0, 6].isnan()


def test_what_comes_behind():
    """What is nearly spanned by relevance, then what is not finite, then what is not valid."""
    x = rows(1, 10, 40).repeat(1, 2, 1) + 1e-4 * rows(1, 20, 40, seed=2)
    x[0, 7], x[0, 17], valid = float("nan"), float("nan"), torch.ones(1, 20, dtype=torch.bool)
    valid[0, [2, 12, 17]] = False
    relevance = factors(1, 20)
    for order, gain in both(x, 20, relevance=relevance, valid=valid):
        chosen = set(order[0, :8].tolist())
        rest = [j for j in range(20) if j not in chosen | {7, 2, 12, 17}]
        assert len({j % 10 for j in chosen}) == 8 and gain[0, :8].gt(0).all() and gain[0, 8:].isnan().all()
        assert order[0, 8:].tolist() == [*sorted(rest, key=lambda j: -relevance[0, j]), 7, 2, 12, 17]


def test_ties_take_the_lowest_index():
    """Also where rows are equal and none of their products is exact."""
    one = rows(1, 1, 37)
    for n in (3, 40, 101):
        for order, _ in both(one.expand(1, n, 37), n):
            assert order[0].tolist() == list(range(n))
    for copies in (2, 5):
        x = rows(3, 41, 96).repeat(1, copies, 1)
        for order, gain in both(x, 41 * copies, relevance=factors(3, 41).repeat(1, copies)):
            assert order[:, :41].lt(41).all() and gain[:, 41:].nan_to_num(0.0).lt(1e-4).all()  # rounding
            assert (order.sort(1).values == torch.arange(41 * copies)).all()


@pytest.mark.parametrize("block, store, table", [(32, 64 << 20, True), (4, 1, True), (7, 4 * 90 * 15, False)])
def test_paths_agree(block, store, table, monkeypatch):
    """Blocks that fill the store over and over, products in one table or row by row."""
    monkeypatch.setattr(determinant_rows, "BLOCK", block)
    monkeypatch.setattr(determinant_rows, "STORE_BYTES", store)
    monkeypatch.setattr(determinant, "TABLE_BYTES", (256 << 20) if table else 0)
    for d, relevance in ((128, None), (128, factors(3, 90)), (30, factors(3, 90))):
        k = min(60, d)
        found, plain = both(rows(3, 90, d), k, relevance=relevance)
        assert torch.equal(found[0], plain[0])
        torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=1e-3)


def test_rows_are_multiplied_once_and_few_of_them(monkeypatch):
    seen, held = [], []
    multiply = determinant_rows._Rows._multiply

    def counted(self, *args):
        multiply(self, *args)
        seen.append(self.width)
        held.append(len(self.place))

    monkeypatch.setattr(determinant_rows._Rows, "_multiply", counted)
    kernels.greedy_determinant(rows(1, 500, 700), 50, relevance=factors(1, 500))
    assert 50 <= sum(seen) <= 160
    seen.clear()
    kernels.greedy_determinant(rows(1, 60, 90), 60)
    assert sum(seen) == 64  # in blocks of 32, each row once
    held.clear()
    monkeypatch.setattr(determinant_rows, "STORE_BYTES", 4 * 500 * 64)
    kernels.greedy_determinant(rows(1, 500, 700), 50)
    assert max(held) == 64 and len(held) > 2  # no more are kept


def test_a_batch_of_three_is_three_batches():
    x, relevance = rows(3, 70, 40), factors(3, 70)
    for which in range(2):
        order, gain = both(x, 30, relevance=relevance)[which]
        for i in range(3):
            alone = both(x[i : i + 1], 30, relevance=relevance[i : i + 1])[which]
            assert torch.equal(alone[0][0], order[i]) and torch.equal(alone[1][0], gain[i])
        assert torch.equal(both(x, 9, relevance=relevance)[which][0], order[:, :9])


@pytest.mark.parametrize("n, k", [(12, 6), (13, 6), (13, 7), (12, 7), (13, 13), (1, 1), (2, 1), (3, 0)])
def test_two_halves_choose_apart(n, k):
    x, relevance = rows(2, n, 20), factors(2, n)
    valid = torch.rand(2, n, generator=torch.Generator().manual_seed(4)) > 0.2
    valid[0, -1], valid[1, n // 2 :: 2] = False, False  # the row that fills up an odd half is no better
    half, first = -(-n // 2), -(-k // 2)
    for more in ({}, {"relevance": relevance}, {"valid": valid}, {"relevance": relevance, "valid": valid}):
        parts = []
        for part, count in ((slice(0, half), first), (slice(half, n), k - first)):
            own = {name: value[:, part] for name, value in more.items()}
            order, gain = kernels.greedy_determinant(x[:, part], count, **own)
            parts.append((order + part.start, gain))
        found = kernels.greedy_determinant(x, k, split=2, **more)
        for have, want in zip(found, zip(*parts)):
            torch.testing.assert_close(have, torch.cat(want, 1), equal_nan=True, atol=1e-6, rtol=1e-5)


def test_halves_do_not_know_of_each_other():
    """A token that stands in both halves stays twice; whole, its copy comes last."""
    x = torch.eye(4)[[0, 1, 0, 2]].unsqueeze(0)
    assert kernels.greedy_determinant(x, 3)[0].tolist() == [[0, 1, 3]]
    assert kernels.greedy_determinant(x, 3, split=2)[0].tolist() == [[0, 1, 2]]


def test_halves_on_meta_tensors():
    x = torch.empty(2, 9, 8, device="meta")
    order, gain = kernels.greedy_determinant(x, 5, relevance=x[..., 0], split=2)
    assert order.shape == gain.shape == (2, 5) and order.dtype == torch.int64


def test_definition_exports():
    class Module(torch.nn.Module):
        def forward(self, x):
            return kernels.greedy_determinant(x, 4)[0]

    x = rows(2, 11, 16)
    program = torch.export.export(Module(), (x,), strict=False)
    assert torch.equal(program.module()(x), Module()(x))


def test_definition_without_data():
    assert reference.greedy_determinant(torch.empty(0, 4, 3), 2)[0].shape == (0, 2)
    assert kernels.greedy_determinant(torch.zeros(2, 3, 0), 2)[0].tolist() == [[0, 1], [0, 1]]
