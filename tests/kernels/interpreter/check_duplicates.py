"""The removal of near duplicates: two launches a round, lists of several lengths, rows that no program sorts."""

from __future__ import annotations

import torch
from drawing import rows

from vlmtok.kernels import reference


def _list(batch, n, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:m] for _ in range(batch)])


def _as_defined(k, x, order, count, **settings):
    found = k.duplicates.drop_duplicates(x, order, count, **settings)
    expected = reference.drop_duplicates(x, order, count, **settings)
    assert found.dtype == torch.int64 and torch.equal(found, expected), (found, expected)
    return found


def duplicates_lists(k):
    """Odd and even lists, rounds of fewer, the last rows of all."""
    for n, m, count, step in ((40, 33, 9, 8), (40, 40, 1, 3), (17, 6, 5, 8), (9, 9, 2, 8), (5, 4, 4, 8), (5, 4, 0, 8)):
        _as_defined(k, rows(2, n, 12), _list(2, n, m), count, step=step)
    assert k.duplicates.drop_duplicates(rows(0, 5, 4), _list(1, 5, 5)[:0], 3).shape == (0, 3)
    _as_defined(k, rows(1, 30, 12, torch.float16), _list(1, 30, 30), 9)


def duplicates_of_one_kind(k):
    """Cosines of 0 and 1: the earlier place leaves."""
    x = torch.eye(4).repeat(1, 8, 1)
    for count in (3, 9, 20):
        _as_defined(k, x, _list(1, 32, 32), count)


def duplicates_not_finite(k):
    """They compare as zero, so that what points away from all others stays longer."""
    x = rows(2, 20, 6)
    x[0, 3], x[0, 4], x[1, 2, 1], x[1, 5] = 0.0, float("nan"), float("inf"), 3e38
    _as_defined(k, x, _list(2, 20, 20), 7, step=2)
    against = torch.tensor([[[1.0, 0.0], [0.5, 0.8], [-1.0, 0.0], [float("nan"), 0.0]]])
    found = k.duplicates.drop_duplicates(against, torch.tensor([[0, 2, 1, 3]]), 3)
    assert found.tolist() == [[1, 2, 3]]


def duplicates_lengths(k):
    """Lists of different lengths by a mask: shorter ones wait, and too short ones are filled up in their order."""
    x, order = rows(4, 30, 8), _list(4, 30, 27)
    valid = torch.rand(4, 30, generator=torch.Generator().manual_seed(3)) > 0.3
    valid[2], valid[3] = True, False
    valid[3, :5] = True
    for limit in (4096, 5):  # of what a program sorts; beyond, torch deals
        before, k.duplicates.LIMIT_ORDER = k.duplicates.LIMIT_ORDER, limit
        for count, step in ((1, 8), (9, 3), (14, 8)):
            for mask in (valid, valid.t().contiguous().t()):
                _as_defined(k, x, order, count, step=step, valid=mask)
        _as_defined(k, x, order, 6)
        k.duplicates.LIMIT_ORDER = before


def duplicates_views(k):
    x, order = rows(4, 60, 12)[::2, 1::2], _list(2, 30, 30).t().contiguous().t()
    _as_defined(k, x, order, 7)
