"""SnapKV: the pooled attention of the prompt's last rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.caches import best, kept, layout, view_of

from vlmtok import SnapKV
from vlmtok.errors import ParameterError
from vlmtok.pruners.snapkv import pooled


def by_hand(row, kernel, pool):
    """The window around each entry, entry by entry; what is not there or NaN counts for nothing."""
    half, found = kernel // 2, []
    for i, own in enumerate(row):
        near = [x for x in row[max(0, i - half) : i + half + 1] if not math.isnan(x)]
        found.append(math.nan if math.isnan(own) else max(near) if pool == "max" else math.fsum(near) / len(near))
    return found


@given(
    rows=st.lists(
        st.lists(st.floats(0, 1, width=32) | st.just(math.nan), min_size=9, max_size=9), min_size=1, max_size=3
    ),
    kernel=st.sampled_from((1, 3, 5, 21)),
    pool=st.sampled_from(("mean", "max")),
)
def test_pooling_equals_a_loop(rows, kernel, pool):
    found = pooled(torch.tensor(rows), kernel, pool)
    wanted = torch.tensor([by_hand(row, kernel, pool) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, atol=1e-7, rtol=1e-6, equal_nan=True)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("scope", ["head", "picture"])
def test_entries_stay_in_clusters(scope, pool):
    """Of heads apart, or by the mean of the heads before it is pooled."""
    mass = torch.rand(3, 20) if scope == "head" else torch.rand(3, 2, 20)
    reduction = SnapKV(keep=6, pool=pool, scope=scope).reduce(view_of({"recent_mass": mass}))
    rows = mass.tolist() if scope == "head" else mass.double().mean(1).tolist()
    assert kept(reduction, 20) == [best(by_hand(row, 5, pool), 6) for row in rows]


def test_equal_entries_go_to_the_lowest_index():
    """Whatever pooling does at the ends."""
    for value in (0.05, 0.3, 1 / 3):
        equal = torch.full((1, 30), value)
        assert all(torch.equal(pooled(equal, kernel, "mean"), equal) for kernel in (3, 5, 7, 9, 11))
        view = view_of({"recent_mass": equal})
        assert kept(SnapKV(keep=7).reduce(view), 30) == [list(range(7))]


def test_an_entry_with_nan_goes_and_its_neighbours_do_not():
    mass = torch.full((1, 12), 0.5)
    mass[0, 3] = float("nan")
    assert kept(SnapKV(keep=11).reduce(view_of({"recent_mass": mass})), 12) == [[i for i in range(12) if i != 3]]


def test_the_window_stands_in_the_site():
    (site, *_) = SnapKV(window=7).sites(layout())
    assert (site.window, site.needs, site.scope) == (7, ("recent_mass",), "head")
    assert SnapKV().sites(layout())[0].window == 32


@pytest.mark.parametrize("bad", [{"window": 0}, {"kernel": 4}, {"kernel": 0}, {"pool": "avg"}, {"keep": -1}])
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="SnapKV"):
        SnapKV(**bad)
