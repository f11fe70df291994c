"""Definition of the greedy choice, against naive loops in double precision."""

import naive
import pytest
import torch
from drawn import rows

from vlmtok import kernels
from vlmtok.errors import ParameterError
from vlmtok.kernels import reference
from vlmtok.kernels.reference.rows import square_products


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


def test_it_begins_with_the_most_isolated_row_where_none_is_named():
    """By cosine, over rows that count; the same as through `match_max`, which other paths take."""
    first = lambda x, valid=None: kernels.greedy_select(x, min(1, x.shape[1]), None, valid=valid)[0].flatten().tolist()  # noqa: E731
    x = rows(3, 40, 6)
    x[1, 7], x[2, 3] = float("nan"), 0
    valid = torch.rand(3, 40, generator=torch.Generator().manual_seed(2)) > 0.3
    for mask in (None, valid):
        nearest = kernels.match_max(x, x, exclude_diag=True, valid_b=mask)[0]
        assert first(x, mask) == reference.most_isolated(nearest, mask).tolist()
        expected = []
        for p, unit in enumerate(torch.nn.functional.normalize(x.double(), dim=-1)):
            counts = ~unit.isnan().any(-1) & (True if mask is None else mask[p])
            cosine = (unit @ unit.T).fill_diagonal_(-9).masked_fill(~counts, -9).amax(1)
            expected.append(int(cosine.masked_fill(~counts, 9).argmin()))
        assert first(x, mask) == expected
    assert first(torch.eye(3)[[0, 1, 2, 0, 1, 2]].unsqueeze(0)) == [0]  # each has a twin
    alone = torch.eye(4)[[0, 0, 1, 2, 2]].unsqueeze(0)
    assert first(alone) == [2] and first(alone, torch.tensor([[True, True, False, True, True]])) == [0]
    nearest = kernels.match_max(alone, alone, exclude_diag=True)[0]
    assert reference.most_isolated(nearest, torch.tensor([[False, True, False, True, True]])).item() == 1
    assert first(torch.randn(2, 1, 4)) == [0, 0]
    assert first(torch.full((1, 5, 4), float("nan"))) == [0]
    with pytest.raises(ParameterError, match="start=None.*cosine"):
        kernels.greedy_select(x, 2, None, metric="l2")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", ["max", "sum"])
def test_it_goes_on_as_from_a_row_that_is_named(rule, masked):
    """Also over pictures of which all rows count, where the first row is looked for in the table itself."""
    x = rows(3, 40, 6)
    valid = torch.rand(3, 40, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    order, value = kernels.greedy_select(x, 40, None, rule=rule, valid=valid)
    again = kernels.greedy_select(x, 40, order[:, 0], rule=rule, valid=valid)
    assert torch.equal(again[0], order) and torch.equal(again[1].nan_to_num(7.0), value.nan_to_num(7.0))
    assert (order.sort(1).values == torch.arange(40)).all()


@pytest.mark.parametrize("n", [511, 512, 515, 577, 1300])
def test_a_square_of_products_is_that_of_all_rows(n):
    """Symmetric; equal rows, wherever they stand, have equal products; a picture's bits are its own."""
    draw = torch.Generator().manual_seed(n)
    place = torch.randint(0, n // 2, (2, n), generator=draw)
    x = torch.nn.functional.normalize(torch.randn(2, n // 2, 96, generator=draw), dim=-1)
    x = torch.stack([own[at] for own, at in zip(x, place)])
    table = square_products(x)
    torch.testing.assert_close(table, x @ x.transpose(1, 2), rtol=0, atol=1e-6)
    assert n < 512 or torch.equal(table, table.transpose(1, 2))
    assert torch.equal(table[1:], square_products(x[1:]))
    for own, at in zip(table, place):
        twin = torch.tensor([int((at == which).nonzero()[0]) for which in at])
        assert torch.equal(own, own[twin]) and torch.equal(own, own[:, twin])
