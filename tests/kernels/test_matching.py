"""Definitions of matching, against naive loops in double precision, and what they promise at the edges."""

import naive
import pytest
import torch
from drawn import DTYPES, NONE, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtok import kernels


def agree(found, expected, value, atol=2e-6):
    """Indices agree where they are not a near tie of the values."""
    picked_value, picked = found
    finite = value.isfinite()
    assert torch.equal(picked_value.isfinite(), finite)
    torch.testing.assert_close(picked_value[finite].double(), value[finite], atol=atol, rtol=1e-5)
    assert (picked == expected).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, d", [(1, 1, 4), (5, 3, 7), (17, 18, 16)])
def test_match_max(m, n, d, dtype):
    a, b = rows(2, m, d, dtype), rows(2, n, d, dtype, 1)
    valid = torch.rand(2, n, generator=torch.Generator().manual_seed(2)) > 0.4
    ranks = {"rank_a": torch.arange(m).expand(2, m), "rank_b": torch.arange(n).flip(0).expand(2, n)}
    for masks in ({}, {"exclude_diag": True}, {"valid_b": valid}, ranks):
        value, index = naive.match_max(a, b, **masks)
        agree(kernels.match_max(a, b, **masks), index, value)


@given(
    st.one_of(st.integers(1, 15), st.integers(16, 60)),
    st.one_of(st.integers(2, 15), st.integers(16, 60)),
    st.integers(1, 100),
    st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_equal_tokens_tie_whatever_the_size(m, n, d, seed):
    """MKL multiplies small matrices and edges another way: equal rows of one product differ there by an ulp."""
    y = rows(1, n, d, seed=seed)
    first, last = sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2].tolist())
    y[:, last] = y[:, first]
    x = y[:, [first]] + 0.1 * rows(1, m, d, seed=seed + 1)
    assert not (kernels.match_max(x, y)[1] == last).any()
    value, _ = kernels.match_max(y, torch.cat([x, x], 1))
    assert value[0, first] == value[0, last]
    for kind in ("elu", "paper", "gaussian"):
        energy = kernels.energy(y, margin=0.5, kind=kind)
        assert energy[0, first] == energy[0, last]
    for rule in ("max", "sum"):
        order = kernels.greedy_select(y, n, torch.zeros(1, dtype=torch.int64), rule=rule)[0][0].tolist()
        assert first == 0 or order.index(first) < order.index(last)


def test_match_max_ties_take_the_lowest_column():
    x = rows(1, 1, 8).expand(1, 40, 8)
    assert kernels.match_max(x, x)[1].eq(0).all()
    assert kernels.match_max(x, x, exclude_diag=True)[1][0].tolist() == [1] + [0] * 39


def test_match_max_without_the_diagonal_of_two_sets():
    """Rows of one set against as many of another: (i, j) is not (j, i)."""
    a, b = rows(2, 9, 8, seed=1), rows(2, 9, 8, seed=2)
    expected = torch.nn.functional.cosine_similarity(a.double().unsqueeze(2), b.double().unsqueeze(1), dim=-1)
    expected.diagonal(dim1=1, dim2=2).fill_(NONE)
    value, index = kernels.match_max(a, b, exclude_diag=True)
    torch.testing.assert_close(value.double(), expected.max(-1).values, atol=1e-6, rtol=0)
    assert torch.equal(index, expected.argmax(-1))


def test_match_max_nan_loses_and_nothing_is_minus_infinity():
    a, b = rows(1, 4, 8), rows(1, 5, 8, seed=1)
    b[0, 0], b[0, 3, 2] = float("nan"), float("inf")
    value, index = kernels.match_max(a, b)
    expected, columns = kernels.match_max(a, b[:, [1, 2, 4]])
    assert torch.equal(value, expected) and torch.equal(index, torch.tensor([1, 2, 4])[columns])
    a[0, 1] = float("nan")
    for masks in ({"valid_b": torch.zeros(1, 5, dtype=torch.bool)}, {}):
        value, index = kernels.match_max(a, b, **masks)
        assert value[0, 1] == NONE and index[0, 1] == 0
    assert kernels.match_max(a, b, valid_b=torch.zeros(1, 5, dtype=torch.bool))[0].eq(NONE).all()


def test_zero_rows_are_similar_to_nothing():
    a, b = torch.zeros(1, 3, 8), rows(1, 5, 8)
    value, index = kernels.match_max(a, b)
    assert value.eq(0).all() and index.eq(0).all()


@pytest.mark.parametrize("kind", ["elu", "paper", "gaussian"])
@pytest.mark.parametrize("margin", [0.5, 0.0, -0.3])
def test_energy(kind, margin):
    x = rows(2, 9, 6)
    x[0, 1], x[0, 2], x[1, 3, 0] = 0, float("nan"), float("inf")
    found = kernels.energy(x, margin=margin, alpha=0.7, kind=kind)
    torch.testing.assert_close(found.double(), naive.energy(x, margin, 0.7, kind), atol=2e-6, rtol=1e-5)
