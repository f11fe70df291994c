"""Definitions of the matchings that plan a merge: every token once, by hand, what is protected."""

import torch
from drawn import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtok import kernels


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 13), prefix=st.integers(0, 2), share=st.floats(0, 0.5), seed=st.integers(0, 9))
def test_plans_are_partitions(n, prefix, share, seed):
    x, r = rows(2, n, 6, seed=seed), int(share * n)
    importance = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    for keep, src, dst in (
        kernels.bipartite_match(x, r, prefix),
        kernels.energy_match(x, r, margin=0.2),
        kernels.energy_match(x, r, margin=0.2, split="halves", kind="gaussian"),
        kernels.energy_match(x, r, margin=0.2, protect=False),
        kernels.complete_match(x, importance, r),
    ):
        assert torch.cat([keep, src], 1).sort(1).values.eq(torch.arange(n)).all()
        assert dst.shape == (2, r) and dst.ge(0).all() and dst.lt(n - r).all()


def test_bipartite_match_by_hand():
    """Similar pairs (0, 3), (2, 1); places 0, 2 and 4 are even, the most similar even place goes first."""
    x = torch.tensor([[[1.0, 0, 0], [0, 1, 0.1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]])
    keep, src, dst = kernels.bipartite_match(x, 2)
    assert (keep.tolist(), src.tolist(), dst.tolist()) == ([[4, 1, 3]], [[0, 2]], [[2, 1]])
    keep, src, dst = kernels.bipartite_match(x, 1, num_prefix=1)  # now 1 and 3 are even
    assert (keep.tolist(), src.tolist(), dst.tolist()) == ([[1, 0, 2, 4]], [[3]], [[1]])


def test_energy_match_by_hand():
    x = torch.tensor([[[1.0, 0, 0], [1, 0.1, 0], [1, 0.2, 0], [1, 0.4, 0], [0, 0, 1], [0, 1, 0]]])
    order = kernels.energy(x, margin=0.5)[0].argsort(descending=True, stable=True).tolist()
    keep, src, dst = kernels.energy_match(x, 2, margin=0.5)
    assert keep[0].tolist() == [*order[4:], order[1], order[3]] and src[0].tolist() == [order[0], order[2]]
    _, partner = kernels.match_max(x[:, [order[0], order[2]]], x[:, [order[1], order[3]]])
    assert torch.equal(dst, partner + 2)


def test_guided_match_is_complete_match_by_the_cosine_with_a_query():
    x, query = rows(2, 11, 6), rows(2, 1, 6, seed=5)[:, 0]
    keep, src, dst, importance = kernels.guided_match(x, query, 4)
    expected = torch.nn.functional.cosine_similarity(x, query.unsqueeze(1), dim=-1)
    torch.testing.assert_close(importance, expected)
    for a, b in zip((keep, src, dst), kernels.complete_match(x, expected, 4)):
        assert torch.equal(a, b)
    assert not kernels.guided_match(x, query.requires_grad_(), 4)[3].requires_grad


def test_complete_match_protects():
    x = rows(2, 9, 6)
    protected = torch.zeros(2, 9, dtype=torch.bool)
    protected[:, [0, 8]] = True
    importance = torch.zeros(2, 9)
    keep, src, dst = kernels.complete_match(x, importance, 3, protected)
    assert not protected.gather(1, src).any()
    assert not protected.gather(1, keep.gather(1, dst)).any()
    assert torch.equal(keep, keep.sort(1).values)
    shielded = importance.scatter(1, src[:, :1], 100.0)  # what is important merges last
    assert not (kernels.complete_match(x, shielded, 3, protected)[1] == src[:, :1]).any()
