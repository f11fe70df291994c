"""The greedy choice."""

from __future__ import annotations

import torch
from drawing import DTYPES, rows, same

from vlmtok.kernels import reference

RULES = (("max", "cosine"), ("sum", "cosine"), ("max", "l2"))


def greedy_choices(k):
    for batch, n, d, count in ((1, 1, 8, 1), (2, 17, 24, 17), (3, 40, 24, 9)):
        for dtype in DTYPES:
            x, start = rows(batch, n, d, dtype), torch.arange(batch) % n
            for rule, metric in RULES:
                settings = {"rule": rule, "metric": metric}
                found = k.greedy.greedy_select(x, count, start, **settings)
                same(found, reference.greedy_select(x, count, start, **settings), 2e-4)


def greedy_ties(k):
    order, _ = k.greedy.greedy_select(torch.ones(1, 20, 8), 20, torch.tensor([5]))
    assert order[0].tolist() == [5, *(i for i in range(20) if i != 5)]
    x = torch.eye(8).repeat(1, 3, 1)
    for rule, metric in RULES:
        settings = {"rule": rule, "metric": metric}
        found, expected = (
            f(x, 24, torch.tensor([2]), **settings)[0] for f in (k.greedy.greedy_select, reference.greedy_select)
        )
        assert torch.equal(found, expected)


def greedy_tiers(k):
    """Free rows, then rows that are not finite, then rows that are not valid; none twice."""
    x = rows(2, 18, 8)
    x[0, 3], x[0, 5, 1], x[1, 0], x[1, 7] = float("nan"), float("inf"), float("nan"), 0
    valid = torch.rand(2, 18, generator=torch.Generator().manual_seed(2)) > 0.5
    for mask in (None, valid, torch.zeros(2, 18, dtype=torch.bool), valid.t().contiguous().t()):
        for rule, metric in RULES:
            settings = {"rule": rule, "metric": metric, "valid": mask}
            found = k.greedy.greedy_select(x, 18, torch.tensor([4, 0]), **settings)
            same(found, reference.greedy_select(x, 18, torch.tensor([4, 0]), **settings), 2e-4)


def greedy_far(k):
    """Squared lengths that overflow, alone or doubled: such rows come late, and none twice."""
    x = rows(2, 12, 4)
    unit = reference.unit_rows(x)
    x[0, [2, 5, 9]], x[1, [1, 3]] = unit[0, [2, 5, 9]] * 1.5e19, unit[1, [1, 3]] * 8e18
    for rule, metric in RULES:
        found = k.greedy.greedy_select(x, 12, torch.tensor([2, 0]), rule=rule, metric=metric)
        same(found, reference.greedy_select(x, 12, torch.tensor([2, 0]), rule=rule, metric=metric), 2e-4)
        assert all(sorted(order) == list(range(12)) for order in found[0].tolist())
    assert k.greedy.greedy_select(x, 12, torch.tensor([2, 0]), metric="l2")[0][0, -2:].tolist() == [5, 9]


def greedy_views(k):
    x, start = rows(4, 30, 12)[::2, 1::2], torch.tensor([[3, 9], [4, 9]])[:, 0]
    same(k.greedy.greedy_select(x, 6, start), reference.greedy_select(x, 6, start))
    assert k.greedy.greedy_select(x, 0, start)[0].shape == (2, 0)
    assert k.greedy.greedy_select(x[:0], 3, start[:0])[0].shape == (0, 3)
    before, k.greedy._GRAM_BYTES = k.greedy._GRAM_BYTES, 1  # a picture at a time
    same(k.greedy.greedy_select(x, 6, start), reference.greedy_select(x, 6, start))
    k.greedy._GRAM_BYTES = before
