"""Grid: every n-th cell, exact counts on any grid, even in both directions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmtok import Site, TokenView, UniformGrid
from vlmtok.errors import ParameterError
from vlmtok.pruners.grid import evenly, spread_cells


def kept(n, grid, **settings):
    return UniformGrid(**settings).reduce(TokenView(torch.zeros(1, n, 2), Site("projected"), grid=grid)).keep[0].tolist()


def test_a_quarter_is_every_second_cell_both_ways():
    assert kept(576, (24, 24), keep=0.25) == [
        row * 24 + column for row in range(1, 24, 2) for column in range(1, 24, 2)
    ]
    assert kept(576, (24, 24), keep=64) == [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
    assert kept(12, (2, 6), keep=3) == [6 * 1 + 1, 6 * 1 + 3, 6 * 1 + 5]
    assert kept(10, None, keep=5) == [1, 3, 5, 7, 9]


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), share=st.floats(0, 1))
def test_counts_are_exact_and_cells_are_even(rows, columns, share):
    k = max(1, round(share * rows * columns))
    cells = spread_cells(rows, columns, k)
    assert len(set(cells)) == k and cells == sorted(cells) and cells[0] >= 0 and cells[-1] < rows * columns
    used = sorted({cell // columns for cell in cells})
    counts = [sum(cell // columns == row for cell in cells) for row in used]
    assert max(counts) - min(counts) <= 1
    gaps = [after - before for before, after in pairwise(used)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(n=st.integers(1, 200), k=st.integers(1, 200))
def test_places_are_even(n, k):
    places = evenly(n, min(k, n))
    gaps = [after - before for before, after in pairwise(places)]
    assert len(set(places)) == min(k, n) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_settings():
    for wrong in ({"keep": 0}, {"separators": "all"}, {"positions": "none"}):
        with pytest.raises(ParameterError):
            UniformGrid(**wrong)
