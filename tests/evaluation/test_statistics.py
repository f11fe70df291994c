"""Paired bootstrap intervals: against one by hand, in cases whose end is known, and on any qualities."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtok.errors import ParameterError
from vlmtok.evaluation import statistics
from vlmtok.evaluation.statistics import paired_difference

SHARES = st.floats(0, 1, allow_nan=False, width=32)
PAIRS = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=40)


def sides(pairs):
    return tuple(np.array(side, float) for side in zip(*pairs))


def by_hand(way, other, draws, seed, level=0.95):
    """Question by question, in pure Python, with other random numbers."""
    rng = np.random.default_rng(seed + 12345)
    found = []
    for _ in range(draws):
        total = 0.0
        for _ in range(len(way)):
            i = int(rng.integers(len(way)))
            total += way[i][int(rng.integers(len(way[i])))] - other[i][int(rng.integers(len(other[i])))]
        found.append(total / len(way))
    found.sort()
    cut = (1 - level) / 2
    return found[round(cut * (draws - 1))], found[round((1 - cut) * (draws - 1))]


@pytest.mark.parametrize("repeats", [1, 3])
def test_against_one_by_hand(repeats):
    """Two bootstraps of the same answers agree as far as 2000 draws of each let them."""
    rng = np.random.default_rng(3)
    other = (rng.random((60, 1)) < 0.9).astype(float)
    way = (rng.random((60, repeats)) < 0.6).astype(float)
    found = paired_difference(way, other)
    low, high = by_hand(way, other, 2000, 0)
    spread = high - low
    assert 0.1 < spread < 0.5 and abs(found.low - low) < 0.12 * spread and abs(found.high - high) < 0.12 * spread
    assert found.mean == pytest.approx(way.mean() - other.mean())


def test_against_the_normal_interval():
    """Of many questions it is the mean +- 1.96 standard errors of the paired differences, not of either side."""
    rng = np.random.default_rng(0)
    level = rng.random(2000)
    way, other = level + rng.normal(0, 0.05, 2000), level
    found = paired_difference(way, other, draws=4000)
    error = (way - other).std() / 2000**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.low + found.high == pytest.approx(2 * (way - other).mean(), abs=0.2 * error)


def test_what_is_equal_has_no_width():
    rng = np.random.default_rng(0)
    same = rng.random(25)
    found = paired_difference(same, same)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    always = paired_difference(np.ones(7), np.zeros(7))
    assert (always.mean, always.low, always.high) == (1, 1, 1)
    one = paired_difference(np.array([0.25]), np.array([1.0]))
    assert (one.mean, one.low, one.high) == (-0.75, -0.75, -0.75)


def test_repeats_that_differ_widen():
    """Two answers of which one is right tell less than one half."""
    other = np.ones(30)
    sure = paired_difference(np.full((30, 1), 0.5), other)
    drawn = paired_difference(np.tile([[0.0, 1.0]], (30, 1)), other)
    assert sure.mean == drawn.mean == -0.5
    assert sure.high == sure.low and drawn.high - drawn.low > 0.25


def test_chunks_leave_no_draw_out(monkeypatch):
    """Many questions are drawn in several goes: as many draws, and intervals as wide."""
    rng = np.random.default_rng(1)
    way, other = rng.random(50), rng.random(50)
    whole = paired_difference(way, other)
    seen = []
    real = np.quantile
    monkeypatch.setattr(statistics.np, "quantile", lambda of, at: (seen.append(len(of)), real(of, at))[1])
    monkeypatch.setattr(statistics, "_CHUNK", 50 * 301)
    parts = paired_difference(way, other)
    assert seen == [statistics.DRAWS]
    assert parts.high - parts.low == pytest.approx(whole.high - whole.low, rel=0.15)
    monkeypatch.setattr(statistics, "_CHUNK", 1)
    assert paired_difference(way, other, draws=10).low <= paired_difference(way, other, draws=10).high


@given(PAIRS, st.integers(0, 1000))
def test_the_mean_is_inside_or_near(pairs, seed):
    """As near as draws of a skewed difference may put it: within half the width."""
    found = paired_difference(*sides(pairs), draws=400, seed=seed)
    slack = 0.5 * (found.high - found.low) + 1e-9
    assert found.low - slack <= found.mean <= found.high + slack
    assert -1 <= found.low <= found.high <= 1


@given(PAIRS, st.integers(0, 1000))
def test_a_higher_level_is_no_narrower(pairs, seed):
    found = [paired_difference(*sides(pairs), draws=200, seed=seed, level=level) for level in (0.5, 0.8, 0.95, 0.99)]
    assert all(wide.low <= slim.low and slim.high <= wide.high for slim, wide in pairwise(found))


@given(PAIRS, st.integers(0, 1000))
def test_the_same_seed_is_the_same_interval_and_sides_change_places(pairs, seed):
    way, other = sides(pairs)
    first = paired_difference(way, other, draws=100, seed=seed)
    assert paired_difference(way, other, draws=100, seed=seed) == first
    turned = paired_difference(other, way, draws=100, seed=seed)
    ends = [turned.mean, turned.low, turned.high]
    assert ends == pytest.approx([-first.mean, -first.high, -first.low], abs=1e-9)


def test_another_seed_is_another_interval():
    rng = np.random.default_rng(2)
    way, other = rng.random(40), rng.random(40)
    assert paired_difference(way, other, seed=0) != paired_difference(way, other, seed=1)


@pytest.mark.parametrize("way, other", [([], []), ([1.0], [1.0, 0.0]), ([[1.0, 0.0]], [[1.0], [0.0]])])
def test_other_questions_are_refused(way, other):
    with pytest.raises(ParameterError, match=f"same questions of both, got {len(way)} and {len(other)}"):
        paired_difference(np.array(way), np.array(other))
