"""Energies, orders, and the plans that sort inside the kernel."""

from __future__ import annotations

import torch
from check_matching import SMALL
from drawing import DTYPES, NONE, rows, same
from torch import Tensor

from vlmtok.kernels import reference


def _energy(k, x, tiles, **settings):
    same([k.energy.energy(x, config=SMALL[tiles], **settings)], [reference.energy(x, **settings)], 1e-5)


def energy_values(k):
    for n, d in ((1, 8), (21, 40), (17, 130)):
        for dtype in DTYPES:
            for kind in ("elu", "paper", "gaussian") if dtype == torch.float32 else ("elu",):
                x = rows(2, n, d, dtype)
                for tiles in SMALL:
                    _energy(k, x, tiles, margin=0.2, alpha=0.7, kind=kind)


def energy_margins(k):
    x = rows(1, 21, 8).abs()
    for margin in (-0.5, 0.0, 0.9):
        for kind in ("elu", "paper", "gaussian"):
            for tiles in SMALL:
                _energy(k, x, tiles, margin=margin, alpha=1.3, kind=kind)
    _energy(k, x, "inline", margin=0.4, alpha=0.0)


def energy_not_finite(k):
    x = rows(2, 21, 16)
    x[0, 1], x[0, 2, 3], x[1, 20, 0], x[1, 3] = float("nan"), float("inf"), float("nan"), 0
    for margin in (0.4, -0.3):
        for kind in ("elu", "paper", "gaussian"):
            for tiles in SMALL:
                _energy(k, x, tiles, margin=margin, alpha=0.7, kind=kind)


def energy_views(k):
    x = rows(2, 40, 12)[:, 1::2]
    same([k.energy.energy(x, margin=0.3)], [reference.energy(x, margin=0.3)], 1e-5)
    assert k.energy.energy(x[:, :0], margin=0.3).shape == (2, 0)
    assert k.energy.energy(x[:0], margin=0.3).shape == (0, 20)


def _distinct(n: int, d: int, seed: int) -> Tensor:
    """Rows whose energies and similarities are no near ties."""
    while True:
        x = rows(2, n, d, seed=seed)
        seed += 100
        levels = reference.energy(x, margin=0.3).sort(1).values
        if (levels[:, 1:] - levels[:, :-1]).min() > 3e-6:
            return x


def plan_bipartite(k):
    for n, d, cases in ((17, 16, ((0, 1), (4, 0), (4, 1), (4, 2), (8, 0))), (40, 130, ((20, 1),))):
        x = _distinct(n, d, 0)
        for r, prefix in cases:
            same(k.order.bipartite_match(x, r, prefix), reference.bipartite_match(x, r, prefix))


def plan_bipartite_ties(k):
    x = rows(1, 1, 8).expand(1, 16, 8).contiguous()
    x[0, 3], x[0, 9], x[0, 6] = rows(1, 1, 8, seed=9)[0, 0], 0, float("nan")
    for prefix in (0, 1):
        same(k.order.bipartite_match(x, 4, prefix), reference.bipartite_match(x, 4, prefix))


def plan_energy(k):
    cases = [{"r": r, "split": split} for r in (3, 8) for split in ("alternate", "halves")]
    cases += [{"r": 0}, {"r": 3, "protect": False}]
    for n, d, some in ((17, 16, cases), (24, 130, [{"r": 5}])):
        x = _distinct(n, d, 0)
        for case in some:
            same(k.order.energy_match(x, margin=0.3, **case), reference.energy_match(x, margin=0.3, **case))


def plan_complete(k):
    for n, d, counts in ((17, 16, (0, 4, 7)), (20, 130, (4,))):
        x = rows(2, n, d)
        importance = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) * 0.2
        protected = torch.zeros(2, n, dtype=torch.bool)
        protected[:, 0], protected[1, n - 1] = True, True
        for r in counts:
            turned = protected.t().contiguous().t()
            for mask in (None, protected, turned) if r == 4 else (protected,):
                found = k.order.complete_match(x, importance, r, mask)
                same(found, reference.complete_match(x, importance, r, mask))
    x = rows(1, 12, 8)
    x[0, 3], x[0, 4], x[0, 5] = float("nan"), x[0, 6], 0
    zero = torch.zeros(1, 12)
    zero[0, 2] = float("nan")
    same(k.order.complete_match(x, zero, 5), reference.complete_match(x, zero, 5))
    same(k.order.complete_match(x, None, 5), reference.complete_match(x, None, 5))
    x[0, 1:9] = float("nan")
    first = torch.zeros(1, 12, dtype=torch.bool)
    first[0, :2] = True
    found = k.order.complete_match(x, None, 5, first)
    same(found, reference.complete_match(x, None, 5, first))
    assert found[0][0, :2].tolist() == [0, 1]  # tokens with NaN go first


def plan_guided(k):
    for n, d, r in ((17, 16, 0), (17, 16, 7), (20, 130, 4)):
        x, query = rows(2, n, d), rows(2, 3, d, seed=4)[:, 1]
        same(k.order.guided_match(x, query, r), reference.guided_match(x, query, r))


def order_of_scores(k):
    """Ties, both zeros, infinities, negative numbers; NaN last."""
    score = torch.tensor(
        [[-0.0, 0.0, 2.5, -1.0, 2.5, NONE, 1e-40, -1e-40, -3.0, float("inf"), NONE, 7.0, float("nan")]]
    )
    n = score.shape[1]
    keep, src = torch.empty(1, n - 4, dtype=torch.int64), torch.empty(1, 4, dtype=torch.int64)
    k.order._order(score, keep, src, k.order._HALVES)
    expected = score.nan_to_num(nan=NONE, posinf=float("inf"), neginf=NONE).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(torch.cat([src, keep[:, n - 8 :], keep[:, : n - 8]], 1), expected)
