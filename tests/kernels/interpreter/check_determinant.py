"""The greedy choice by determinants: one program a picture, one launch a round, with a table and without."""

from __future__ import annotations

import torch
from drawing import DTYPES, rows, same

from vlmtok.kernels import reference


def _ways(k):
    """The kernel in each of its forms: (name, call); what is patched is put back."""

    def in_rounds(*args, table=True, **kwargs):
        module = k.determinant
        before = module.LIMIT_DETERMINANT, module.has_table, module._AHEAD_ROUND
        module.LIMIT_DETERMINANT, module.has_table, module._AHEAD_ROUND = 0, lambda n: table, 4
        try:
            return module.greedy_determinant(*args, **kwargs)
        finally:
            module.LIMIT_DETERMINANT, module.has_table, module._AHEAD_ROUND = before

    return {
        "program": k.determinant.greedy_determinant,
        "rounds": in_rounds,
        "rounds without a table": lambda *args, **kwargs: in_rounds(*args, table=False, **kwargs),
    }


def _as_defined(k, x, count, tolerance=2e-5, **settings):
    expected = reference.greedy_determinant(x, count, **settings)
    for call in _ways(k).values():
        same(call(x, count, **settings), expected, tolerance)
    return expected


def determinant_choices(k):
    for dtype in DTYPES:
        _as_defined(k, rows(2, 13, 24, dtype), 13)
    for batch, n, d, count in ((1, 1, 8, 1), (3, 40, 48, 11), (1, 300, 70, 4)):
        _as_defined(k, rows(batch, n, d), count, relevance=rows(batch, n, 1, seed=1)[..., 0].abs() + 0.1)


def determinant_spanned(k):
    """Beyond the rank by relevance, copies after the others, zero rows with them."""
    x = torch.eye(4)[[0, 0, 0, 1, 1, 2]].unsqueeze(0).repeat(2, 1, 1)
    x[1, 4] = 0.0
    weight = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2, 0.8]]).expand(2, -1)
    for relevance in (None, weight, weight.half(), weight.double().t().contiguous().t()):
        order, gain = _as_defined(k, x, 6, relevance=relevance)
        assert (gain.isnan().sum(1) == torch.tensor([3, 3])).all()
    assert order.tolist() == [[1, 5, 3, 2, 4, 0], [1, 5, 3, 2, 4, 0]]


def determinant_ties(k):
    order, _ = _as_defined(k, torch.ones(1, 20, 8), 20)
    assert order[0].tolist() == list(range(20))
    order, _ = _as_defined(k, torch.eye(8).repeat(1, 17, 1), 10, relevance=torch.full((1, 136), 0.7))
    assert order[0].tolist() == list(range(10))


def determinant_tiers(k):
    """Rows with variance, spanned ones, those that are not finite, those that are not valid; none twice."""
    x = rows(2, 18, 40)
    x[0, 3], x[0, 5, 1], x[1, 0], x[1, 7] = float("nan"), float("inf"), float("nan"), 0
    weight = rows(2, 18, 1, seed=1)[..., 0].abs() + 0.1
    weight[0, 1], weight[0, 2], weight[1, 1], weight[1, 2], weight[1, 4] = float("nan"), -3.0, float("inf"), -0.0, 1e-30
    valid = torch.rand(2, 18, generator=torch.Generator().manual_seed(2)) > 0.4
    valid[0, 3], valid[1, 0] = True, True
    nothing, turned = torch.zeros(2, 18, dtype=torch.bool), valid.t().contiguous().t()
    for relevance, masks in ((None, (None, valid)), (weight, (None, nothing, turned))):
        for mask in masks:
            order, _ = _as_defined(k, x, 18, relevance=relevance, valid=mask)
            assert all(sorted(row) == list(range(18)) for row in order.tolist())


def determinant_views(k):
    x = rows(4, 60, 24)[::2, 1::2]
    relevance, valid = rows(2, 30, 2, seed=1).abs()[..., 1], (rows(2, 30, 3, seed=2) > -1)[..., 1]
    _as_defined(k, x, 6, relevance=relevance, valid=valid)
    assert k.determinant.greedy_determinant(x, 0)[0].shape == (2, 0)
    assert k.determinant.greedy_determinant(x[:0], 3)[0].shape == (0, 3)
    before, k.determinant.pictures_at_a_time = k.determinant.pictures_at_a_time, lambda batch, n: 1
    _as_defined(k, x, 6, relevance=relevance, valid=valid)
    k.determinant.pictures_at_a_time = before


def determinant_alone(k):
    """A batch of three has the bits of three batches of one."""
    x, relevance = rows(3, 33, 20), rows(3, 33, 1, seed=1)[..., 0].abs()
    for call in _ways(k).values():
        together = call(x, 9, relevance=relevance)
        for i in range(3):
            alone = call(x[i : i + 1], 9, relevance=relevance[i : i + 1])
            assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])
