"""Definition of the greedy choice, against naive loops in double precision."""

import naive
import pytest
import torch
from drawn import rows

from vlmtok import kernels


@pytest.mark.parametrize("rule, metric", [("max", "cosine"), ("sum", "cosine"), ("max", "l2")])
def test_greedy_select(rule, metric):
    x = rows(2, 12, 6)
    x[1, 4], x[0, 7] = float("nan"), 0
    start = torch.tensor([3, 11])
    valid = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    for mask in (None, valid):
        for k in (0, 1, 5, 12):
            order, value = kernels.greedy_select(x, k, start, rule=rule, metric=metric, valid=mask)
            assert torch.equal(order, naive.greedy_select(x, k, start, rule, metric, mask).reshape(2, k))
            assert value.shape == (2, k) and value[:, :1].isnan().all()


def test_greedy_select_ties_and_fallbacks():
    order, _ = kernels.greedy_select(torch.ones(1, 8, 4), 8, torch.tensor([5]))
    assert order[0].tolist() == [5, 0, 1, 2, 3, 4, 6, 7]
    x = rows(1, 6, 4)
    x[0, 1] = float("nan")
    valid = torch.tensor([[True, True, False, True, False, True]])
    order, value = kernels.greedy_select(x, 6, torch.tensor([0]), valid=valid)
    assert sorted(order[0, 1:3].tolist()) == [3, 5] and order[0, 3:].tolist() == [1, 2, 4]
    assert value[0, 3:].isnan().all() and value[0, 1:3].isfinite().all()
