"""The greedy choice by coverage."""

from __future__ import annotations

import torch
from drawing import DTYPES, rows, same

from vlmtok.kernels import reference


def _quarters(batch: int, n: int, targets: int, seed: int = 0) -> torch.Tensor:
    """Tables whose sums are exact in any order, with many ties."""
    return (4 * rows(batch, n, targets, seed=seed)).round() / 4


def cover_choices(k):
    for batch, n, targets, count in ((1, 1, 1, 1), (2, 17, 300, 17), (3, 40, 33, 9), (1, 33, 0, 5)):
        for dtype in DTYPES:
            table = _quarters(batch, n, targets).to(dtype)
            weight = rows(batch, n, 1, seed=1)[..., 0].abs().mul(4).round()
            for own in (None, weight):
                found = k.cover.greedy_cover(table, count, weight=own)
                same(found, reference.greedy_cover(table, count, weight=own))


def cover_ties(k):
    table = torch.ones(1, 20, 8)
    order, gain = k.cover.greedy_cover(table, 20)
    assert order[0].tolist() == list(range(20)) and gain[0].tolist() == [8.0] + [0.0] * 19
    table = torch.eye(8).repeat(1, 5, 1)
    same(k.cover.greedy_cover(table, 40), reference.greedy_cover(table, 40))


def cover_tiers(k):
    """Candidates, then rows that are not finite, then late ones; none twice; weights below zero are none."""
    table = _quarters(2, 18, 40)
    table[0, 3, 5], table[0, 5, 1], table[1, 0, 39], table[1, 7] = float("nan"), float("inf"), float("nan"), -1.0
    late = torch.randint(-1, 4, (2, 18), generator=torch.Generator().manual_seed(2))
    weight = rows(2, 18, 1)[..., 0].mul(4).round()
    weight[1, 4] = float("nan")
    for tiers in (None, late, torch.full((2, 18), 2**62), late.t().contiguous().t()):
        for own in (None, weight):
            found = k.cover.greedy_cover(table, 18, weight=own, late=tiers)
            same(found, reference.greedy_cover(table, 18, weight=own, late=tiers))
            assert all(sorted(order) == list(range(18)) for order in found[0].tolist())


def cover_tiles(k):
    """Enough rows for tiles of sixteen; each is a program's, each target another's."""
    table = _quarters(3, 2830, 20)
    same(k.cover.greedy_cover(table, 2), reference.greedy_cover(table, 2))


def cover_views(k):
    table = _quarters(4, 30, 12)[::2, 1::2]
    same(k.cover.greedy_cover(table, 6), reference.greedy_cover(table, 6))
    assert k.cover.greedy_cover(table, 0)[0].shape == (2, 0)
    assert k.cover.greedy_cover(table[:0], 3)[0].shape == (0, 3)


def cover_cosines(k):
    x = rows(2, 24, 8)
    x[0, 3], x[1, 5, 2], x[1, 9] = float("nan"), float("inf"), 0
    weight, valid = rows(2, 24, 1, seed=1)[..., 0].abs(), rows(2, 24, 1, seed=2)[..., 0] > -1
    weight[1, 2] = float("nan")
    for settings in ({}, {"weight": weight}, {"valid": valid}, {"weight": weight, "valid": valid}):
        expected = reference.greedy_cover_cosine(x, 24, **settings)
        same(k.cover.greedy_cover_cosine(x, 24, **settings), expected, 2e-5)
        before, k.cover.TABLE_BYTES = k.cover.TABLE_BYTES, 1  # a picture at a time
        same(k.cover.greedy_cover_cosine(x, 24, **settings), expected, 2e-5)
        k.cover.TABLE_BYTES = before
    assert k.cover.greedy_cover_cosine(x[:0], 3)[0].shape == (0, 3)
