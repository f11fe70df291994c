"""ToMe and PiToMe alone: reference vectors of the published implementations, ties, and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_equal
from support.merging_by_hand import golden, golden_names, groups, pitome_by_hand, tome_by_hand

from vlmtok import PiToMe, Reduction, Site, TokenView, ToMe


def hand_view(data, prefix, layer=0):
    size = data["size_in"][..., 0] if "size_in" in data else None
    keys = data["metric"][:, prefix:]
    return TokenView(
        data["x"][:, prefix:],
        Site("vision", layer, "mid"),
        size=None if size is None else size[:, prefix:],
        num_prefix=prefix,
        signals={"keys": keys},
    )


def shortened(data, reduction, view, prefix):
    """(tokens, sizes) with the prefix in front, as the reference files hold them."""
    x, size = view.tokens, torch.ones(view.tokens.shape[:2]) if view.size is None else view.size
    if reduction is not None:
        x, size = reduction.apply(x, size)
    head = data["size_in"][:, :prefix, 0] if "size_in" in data else torch.ones(len(x), prefix)
    return torch.cat([data["x"][:, :prefix], x], 1), torch.cat([head, size], 1)


def owners(reduction, n, prefix):
    """Slot of every token of the whole row."""
    batch = 1 if reduction is None else reduction.keep.shape[0]
    if reduction is None:
        return torch.arange(n + prefix).expand(batch, -1)
    inner = reduction.assignment(n)
    return torch.cat([torch.arange(prefix).expand(batch, prefix), inner + prefix], 1)


TOME = ["tome_10_ties_duplicates.npz", "tome_12_zero_norm.npz"]
"""Files whose indices are no reference: ties, and a division by zero."""


@pytest.mark.parametrize("name", [name for name in golden_names("tome_*.npz", 9) if name not in TOME])
def test_tome_reference_vectors(name):
    data = golden(name)
    prefix = int(data["class_token"]) + int(data["distill_token"])
    view = hand_view(data, prefix)
    method = ToMe(r=data["r"])
    reduction = method.reduce(view)
    assert method.count(view.counts) == (view.tokens.shape[1] if reduction is None else reduction.slots)
    x, size = shortened(data, reduction, view, prefix)
    assert_equal(x, data["x_out"], 1e-5)
    assert_equal(size, data["size_out"][..., 0], 0)
    if "source_out" not in data or reduction is None:
        return
    assert_merged_back_and_plain(data, reduction, view, prefix)
    gaps = [data[key] for key in ("gap_boundary", "gap_order_min", "gap_argmax_min") if key in data]
    assert min(gaps) > 1e-6
    assert torch.equal(owners(reduction, view.tokens.shape[1], prefix), data["source_out"].argmax(1))


def assert_merged_back_and_plain(data, reduction, view, prefix):
    """`unmerge` and `Reduction.mean` against the published ones, where a file has them."""
    if "x_unmerged" in data:
        inner = reduction.unmerge(data["x_out"][:, prefix:], view.tokens.shape[1])
        assert_equal(torch.cat([data["x_out"][:, :prefix], inner], 1), data["x_unmerged"], 1e-5)
    if "x_mean" in data:
        plain = Reduction.mean(reduction.keep, reduction.src, reduction.dst).apply(view.tokens, view.size)[0]
        assert_equal(plain, data["x_mean"][:, prefix:], 2e-5)


def test_tome_ties_go_to_the_lowest_index():
    data = golden("tome_10_ties_duplicates.npz")
    view = hand_view(data, int(data["class_token"]))
    reduction = ToMe(r=data["r"]).reduce(view)
    again = ToMe(r=data["r"]).reduce(view)
    assert torch.equal(reduction.keep, again.keep)
    assert torch.equal(reduction.dst, again.dst)
    x = torch.ones(1, 8, 4)
    reduction = ToMe(r=2).reduce(TokenView(x, signals={"keys": x}))
    assert (reduction.src.tolist(), reduction.keep.tolist(), reduction.dst.tolist()) == (
        [[0, 2]],
        [[4, 6, 1, 3, 5, 7]],
        [[2, 2]],
    )


def test_a_zero_key_merges_last():
    """The release divides by zero there and merges every token into one."""
    data = golden("tome_12_zero_norm.npz")
    view = hand_view(data, int(data["class_token"]))
    reduction = ToMe(r=data["r"]).reduce(view)
    x, size = reduction.apply(view.tokens, view.size)
    assert bool(x.isfinite().all())
    assert float(size.sum()) == view.tokens.shape[0] * view.tokens.shape[1]


MODES = {
    "full": {},
    "obsm": {"protect": "none"},
    "text": {"energy": "gaussian", "split": "halves"},
    "bsm": {"plain": 1},
}


@pytest.mark.parametrize(
    "name", [name for name in golden_names("pitome_*.npz", 11) if name != "pitome_12_ties_duplicates.npz"]
)
def test_pitome_reference_vectors(name):
    data = golden(name)
    prefix = int(data["class_token"])
    view = hand_view(data, prefix)
    method = PiToMe(ratio=data["ratio"], margin=data["margin"], alpha=data["alpha"], **MODES[data["mode"]])
    reduction = method.reduce(view)
    assert method.count(view.counts) == (view.tokens.shape[1] if reduction is None else reduction.slots)
    x, size = shortened(data, reduction, view, prefix)
    wanted, sizes = data["x_out"], data["size_out"][..., 0]
    n = view.tokens.shape[1]
    if data.get("gap_energy_order_min", 1.0) > 1e-6:
        assert_equal(x, wanted, 2e-5)
        assert_equal(size, sizes, 0)
        if "source_out" in data and reduction is not None:
            assert torch.equal(owners(reduction, n, prefix), data["source_out"].argmax(1))
            assert_merged_back_and_plain(data, reduction, view, prefix)
        return
    # Two energies tie: protected tokens may stand in another order.
    assert data["gap_energy_top"] > 1e-6
    for row in range(len(x)):
        found = {tuple(sorted(group)) for group in groups(owners(reduction, n, prefix)[row])}
        assert found == {tuple(sorted(group)) for group in groups(data["source_out"].argmax(1)[row])}
    assert_equal(x.sort(1).values, wanted.sort(1).values, 2e-5)


def test_pitome_ties_go_to_the_lowest_index():
    data = golden("pitome_12_ties_duplicates.npz")
    prefix = int(data["class_token"])
    view = hand_view(data, prefix)
    method = PiToMe(ratio=data["ratio"], margin=data["margin"], alpha=data["alpha"])
    reduction, again = method.reduce(view), method.reduce(view)
    assert reduction.slots == data["x_out"].shape[1] - prefix
    for name in ("keep", "src", "dst"):
        assert torch.equal(getattr(reduction, name), getattr(again, name))
    x, size = reduction.apply(view.tokens, view.size)
    assert_equal((x * size.unsqueeze(-1)).sum(1), view.tokens.sum(1))
    x = torch.ones(1, 8, 4)
    reduction = PiToMe(ratio=0.75).reduce(TokenView(x, signals={"keys": x}))
    assert (reduction.src.tolist(), reduction.keep.tolist(), reduction.dst.tolist()) == (
        [[0, 2]],
        [[4, 5, 6, 7, 1, 3]],
        [[4, 4]],
    )


@given(seed=st.integers(0, 10_000), n=st.integers(4, 40), prefix=st.integers(0, 3), data=st.data())
def test_tome_equals_plain_loops(seed, n, prefix, data):
    r = data.draw(st.integers(1, n // 2))
    keys = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(seed))
    reduction = ToMe(r=r).reduce(TokenView(keys, num_prefix=prefix, signals={"keys": keys}))
    stay, pairs, odd = tome_by_hand(keys[0], r, prefix)
    assert reduction.keep[0].tolist() == [*stay, *odd]
    slots = [*stay, *odd]
    assert list(zip(reduction.src[0].tolist(), reduction.dst[0].tolist())) == [(a, slots.index(b)) for a, b in pairs]


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(4, 40),
    ratio=st.floats(0.5, 0.95),
    margin=st.floats(-0.5, 0.9),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_pitome_equals_plain_loops(seed, n, ratio, margin, alpha):
    keys = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(seed))
    method = PiToMe(ratio=ratio, margin=margin, alpha=alpha)
    reduction = method.reduce(TokenView(keys, num_prefix=1, signals={"keys": keys}))
    r = min(math.floor(n - n * ratio), n // 2)
    if r == 0:
        assert reduction is None
        return
    protected, pairs, b = pitome_by_hand(keys[0], r, margin, alpha)
    slots = [*protected, *b]
    if alpha == 0:  # energies are zero exactly for many tokens: only the sets are certain
        assert sorted(reduction.keep[0].tolist() + reduction.src[0].tolist()) == list(range(n))
        return
    assert reduction.keep[0].tolist() == slots
    assert list(zip(reduction.src[0].tolist(), reduction.dst[0].tolist())) == [(a, slots.index(j)) for a, j in pairs]


@pytest.mark.parametrize("kind", ["tome", "pitome"])
def test_chains_keep_sizes_and_sources(kind):
    """Three steps behind each other (r = 8, 6, 20; ratios .9, .85, .8): sums, sizes and sources stay exact."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 50, 12, generator=generator)
    original, size, joined = x, None, None
    steps = [8, 6, 20] if kind == "tome" else [0.9, 0.85, 0.8]
    lengths = []
    for step, value in enumerate(steps):
        keys = torch.randn(2, x.shape[1], 8, generator=generator)
        method = ToMe(r=value) if kind == "tome" else PiToMe(ratio=value, margin=(0.75, 0.5, 0.25)[step])
        reduction = method.reduce(TokenView(x, size=size, signals={"keys": keys}))
        x, size = reduction.apply(x, size)
        joined = reduction if joined is None else joined.then(reduction)
        lengths.append(x.shape[1])
    assert lengths == ([42, 36, 18] if kind == "tome" else [45, 39, 32])
    owner = joined.assignment(50)
    for row in range(2):
        for slot in range(x.shape[1]):
            members = (owner[row] == slot).nonzero()[:, 0]
            assert int(size[row, slot]) == len(members)
            assert_equal(x[row, slot], original[row, members].mean(0))
    once, sizes = joined.apply(original)
    assert_equal(once, x)
    assert_equal(sizes, size, 0)
