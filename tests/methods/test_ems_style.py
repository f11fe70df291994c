"""EMSStyle: a loop over heads, conservation, and what it is without merging."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.caches import best, kept, layout, view_of
from support.checks import assert_equal

from vlmtok import EMSStyle
from vlmtok.core.cache_scores import shares
from vlmtok.errors import ParameterError


def made(seed, n, heads=4, dtype=torch.float32, spread=0.6):
    """Signals of some heads whose keys lie near a few directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=generator)
    keys = centres[torch.randint(0, 3, (heads, n), generator=generator)]
    keys = keys + spread * torch.randn(heads, n, 8, generator=generator)
    mass, recent = (torch.rand(heads, n, generator=generator) for _ in range(2))
    rows = torch.arange(n + 5, 5, -1).float().expand(heads, n)
    return {
        "attention_mass": mass * rows,
        "attention_rows": rows,
        "recent_mass": recent,
        "keys_cached": keys.to(dtype),
    }


def by_hand(signals, head, k, tau):
    """Centres, and the centre (or None) of each candidate, of one head in float64."""
    mass, rows, recent = (
        signals[name][head].double().tolist() for name in ("attention_mass", "attention_rows", "recent_mass")
    )
    keys, n = signals["keys_cached"][head].double().tolist(), len(mass)
    seen = [one / row for one, row in zip(mass, rows)]
    score = [a / math.fsum(seen) + b / math.fsum(recent) for a, b in zip(seen, recent)]
    order = sorted(range(n), key=lambda i: -score[i])
    centres, joins = sorted(order[:k]), {}

    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b)) / (math.hypot(*a) * math.hypot(*b))

    for candidate in order[k : k + min(k, n - k)]:
        near = [cosine(keys[candidate], keys[centre]) for centre in centres]
        joins[candidate] = centres[near.index(max(near))] if max(near) >= tau else None
    return centres, joins


@given(
    seed=st.integers(0, 500), n=st.integers(2, 24), keep=st.floats(0.05, 0.9), tau=st.sampled_from((-1, 0.3, 0.6, 0.9))
)
def test_each_head_equals_a_loop(seed, n, keep, tau):
    signals = made(seed, n)
    method, view = EMSStyle(keep=keep, tau=tau), view_of(signals)
    reduction = method.reduce(view)
    k = method.count(view.counts)
    if k == n:
        assert reduction is None
        return
    values = torch.randn(4, n, 6, dtype=torch.float64)
    slots, sizes = reduction.apply(values)
    for head in range(4):
        centres, joins = by_hand(signals, head, k, tau)
        assert reduction.keep[head].tolist() == centres
        found = dict(zip(reduction.src[head].tolist(), reduction.dst[head].tolist(), strict=True))
        assert {one: None if at < 0 else centres[at] for one, at in found.items()} == joins
        for slot, centre in enumerate(centres):
            members = [centre, *(one for one, at in joins.items() if at == centre)]
            assert sizes[head, slot] == len(members)
            assert_equal(slots[head, slot], values[head, members].mean(0))


@given(seed=st.integers(0, 500), n=st.integers(2, 40), keep=st.integers(1, 20))
def test_nothing_is_lost_or_counted_twice(seed, n, keep):
    """Sizes of the slots and of what went add up to the entries, of entries that stand for several too."""
    reduction = EMSStyle(keep=keep).reduce(view_of(made(seed, n)))
    if reduction is None:
        return
    size = torch.randint(1, 5, (4, n)).float()
    _, sizes = reduction.apply(torch.zeros(4, n, 2), size)
    gone = (reduction.assignment(n) < 0).float()
    assert torch.equal(sizes.sum(1) + (gone * size).sum(1), size.sum(1))


def test_heads_merge_different_numbers_in_one_shape():
    reduction = EMSStyle(keep=8, tau=0.8).reduce(view_of(made(1, 40, heads=9)))
    joining = (reduction.dst >= 0).sum(1).tolist()
    assert reduction.dst.shape == (9, 8) and len(set(joining)) > 1, joining


def test_above_one_it_prunes():
    signals = made(3, 30)
    reduction = EMSStyle(keep=7, tau=1.01).reduce(view_of(signals))
    score = shares(signals["attention_mass"] / signals["attention_rows"]) + shares(signals["recent_mass"])
    assert kept(reduction, 30) == [best(row, 7) for row in score.tolist()]
    assert bool((reduction.dst == -1).all())
    values = torch.randn(4, 30, 5)
    slots, sizes = reduction.apply(values)
    assert torch.equal(slots, reduction.gather(values)) and bool((sizes == 1).all())


def test_nan_loses_and_ties_go_to_the_first():
    signals = {name: torch.full((2, 12), 0.5) for name in ("attention_mass", "attention_rows", "recent_mass")}
    signals["keys_cached"] = torch.ones(2, 12, 4)
    signals["attention_mass"][1, 2] = float("nan")
    signals["keys_cached"][0, 1] = float("nan")
    reduction = EMSStyle(keep=4).reduce(view_of(signals))
    assert reduction.keep.tolist() == [[0, 1, 2, 3], [0, 1, 3, 4]]
    assert reduction.src.tolist() == [[4, 5, 6, 7], [5, 6, 7, 8]] and reduction.dst.tolist() == [[0] * 4] * 2
    signals["keys_cached"][0, 5] = float("nan")
    assert EMSStyle(keep=4).reduce(view_of(signals)).dst[0].tolist() == [0, -1, 0, 0]


def test_a_cosine_of_tau_itself_joins():
    signals = {name: torch.full((1, 6), 0.5) for name in ("attention_mass", "attention_rows", "recent_mass")}
    view = view_of({**signals, "keys_cached": torch.ones(1, 6, 4)})
    assert EMSStyle(keep=2, tau=1.0).reduce(view).dst.tolist() == [[0, 0]]


def test_a_head_without_mass_and_rows_that_saw_nothing():
    signals = {name: torch.zeros(1, 6) for name in ("attention_mass", "attention_rows", "recent_mass")}
    reduction = EMSStyle(keep=2).reduce(view_of({**signals, "keys_cached": torch.ones(1, 6, 4)}))
    assert reduction.keep.tolist() == [[0, 1]]


def test_what_it_says():
    (site, *_) = EMSStyle(window=9).sites(layout())
    assert (site.window, site.scope) == (9, "head") and "attention_rows" in site.needs
    assert "pproximate" in EMSStyle.deviations[0] and "approximate" in EMSStyle.__doc__
    assert EMSStyle.merge_keys == "kept" and not EMSStyle().proportional and EMSStyle(proportional=True).proportional


@pytest.mark.parametrize("bad", [{"tau": 3}, {"tau": -2}, {"window": 0}, {"proportional": 1}, {"keep": 0}])
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="EMSStyle"):
        EMSStyle(**bad)
