"""What `Reduction` answers and refuses: merging by hand, one behind the other, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_equal, assert_same

from vlmtok import Reduction
from vlmtok.errors import (
    ParameterError,
)

KEEP, SRC = torch.tensor([[0, 2, 3]]), torch.tensor([[1, 4]])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": KEEP[0]}, r"keep must be int64 \[B, K\]"),
        ({"keep": KEEP.int()}, r"keep must be int64 \[B, K\], got torch.int32"),
        ({"keep": KEEP, "src": SRC}, "src and dst together"),
        ({"keep": KEEP, "src": SRC, "dst": SRC[:, :1]}, "src and dst must be int64"),
        ({"keep": KEEP, "src": SRC.float(), "dst": SRC}, "src and dst must be int64"),
        ({"keep": KEEP, "src": SRC.expand(2, -1), "dst": SRC.expand(2, -1)}, "with B = 1"),
        (
            {"keep": KEEP, "src": SRC, "dst": SRC, "keep_weight": torch.ones(1, 3)},
            "keep_weight and src_weight together",
        ),
        ({"keep": KEEP, "keep_weight": torch.ones(1, 3), "src_weight": torch.ones(1, 0)}, "need src and dst"),
        (
            {"keep": KEEP, "src": SRC, "dst": SRC, "keep_weight": torch.ones(1, 2), "src_weight": torch.ones(1, 2)},
            "shapes of keep",
        ),
        ({"keep": KEEP, "valid": torch.ones(1, 3)}, "valid must be bool"),
        ({"keep": KEEP, "valid": torch.ones(1, 2, dtype=torch.bool)}, "valid must be bool"),
    ],
)
def test_reductions_that_cannot_be(given, says):
    with pytest.raises(ParameterError, match=says):
        Reduction(**given)


def test_a_reduction_by_hand():
    """Slots are 0+1 (sizes 1 and 3), 2, 3; token 4 joins nothing."""
    x, size = torch.tensor([[[0.0], [4.0], [2.0], [7.0], [9.0]]]), torch.tensor([[1.0, 3.0, 1.0, 2.0, 5.0]])
    merged = Reduction(KEEP, SRC, torch.tensor([[0, -1]]))
    slots, sizes = merged.apply(x, size)
    assert (slots[0, :, 0].tolist(), sizes[0].tolist()) == ([3.0, 2.0, 7.0], [4.0, 1.0, 2.0])
    assert merged.assignment(5).tolist() == [[0, 0, 1, 2, -1]]
    assert merged.unmerge(slots, 5)[0, :, 0].tolist() == [3.0, 3.0, 2.0, 7.0, 0.0]
    plain, counts = Reduction.mean(KEEP, SRC, torch.tensor([[0, -1]])).apply(x, size)
    assert (plain[0, :, 0].tolist(), counts[0].tolist()) == ([2.0, 2.0, 7.0], [4.0, 1.0, 2.0])
    weighted = Reduction(
        KEEP, SRC, torch.tensor([[0, 0]]), torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[2.0, 1.0]])
    )
    assert weighted.apply(x, size)[0][0, :, 0].tolist() == [17.0, -2.0, 3.5]
    pruned, left = Reduction(KEEP).apply(x, size)
    assert (pruned[0, :, 0].tolist(), left[0].tolist()) == ([0.0, 2.0, 7.0], [1.0, 1.0, 2.0])
    assert_same(Reduction(KEEP).apply(x)[1], torch.ones(1, 3))


def test_the_first_entry_that_names_a_token_owns_it():
    """With weights a token may occur several times; a kept one of an invalid slot may join another one."""
    keep, src, dst = torch.tensor([[0, 2]]), torch.tensor([[1, 3, 1, 3]]), torch.tensor([[-1, 1, 0, 0]])
    assert Reduction(keep, src, dst, torch.ones(1, 2), torch.ones(1, 4)).assignment(5).tolist() == [[0, 0, 1, 1, -1]]
    ragged = Reduction(keep, torch.tensor([[2]]), torch.tensor([[0]]), valid=torch.tensor([[True, False]]))
    assert ragged.assignment(3).tolist() == [[0, -1, 0]]
    assert ragged.apply(torch.ones(1, 3, 1), torch.tensor([[1.0, 2.0, 4.0]]))[1].tolist() == [[5.0, 0.0]]


def test_features_may_keep_protected_tokens():
    x, cls = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[[9.0]]])
    slots, sizes = Reduction(torch.tensor([[3, 1]])).apply(x, None, cls)
    assert (slots[0, :, 0].tolist(), sizes[0].tolist()) == ([9.0, 3.0], [0.0, 1.0])


@given(seed=st.integers(0, 1000), weighted=st.tuples(st.booleans(), st.booleans()))
def test_then_is_one_after_the_other(seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    x, size = torch.randn(2, 12, 3, generator=generator), torch.randint(1, 5, (2, 12), generator=generator).float()

    def drawn(n, mean):
        order = torch.stack([torch.randperm(n, generator=generator) for _ in range(2)])
        k = n // 2
        keep, src = order[:, :k], order[:, k : n - 1]  # one token is dropped
        dst = torch.randint(-1, k, src.shape, generator=generator)
        return (Reduction.mean if mean else Reduction)(keep, src, dst)

    one, other = drawn(12, weighted[0]), drawn(6, weighted[1])
    first, sizes = one.apply(x, size)
    wanted, left = other.apply(first, sizes)
    joined = one.then(other, size)
    found, found_size = joined.apply(x, size)
    assert_equal(found, wanted)
    assert_equal(found_size, left, 0)
    owner = one.assignment(12)
    chained = torch.where(owner < 0, -1, other.assignment(6).gather(1, owner.clamp(min=0)))
    assert torch.equal(joined.assignment(12), chained)


def test_empty_entries_may_name_no_token():
    x = torch.randn(1, 6, 3)
    one = Reduction(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-1, 4, 5]]), torch.tensor([[-1, 0, 2]]))
    other = Reduction.mean(torch.tensor([[0, 2]]), torch.tensor([[1, -1]]), torch.tensor([[0, -1]]))
    for first, second in ((one, other), (one, Reduction(other.keep, other.src, other.dst))):
        wanted, sizes = second.apply(*first.apply(x))
        found, found_sizes = first.then(second, torch.ones(1, 6)).apply(x)
        assert_equal(found, wanted)
        assert_equal(found_sizes, sizes, 0)


def test_unmerge_gives_zeros_where_tokens_were_dropped():
    spread = Reduction(torch.tensor([[0, 1]])).unmerge(torch.tensor([[[float("nan")], [1.0]]]), 3)
    assert spread[0, 1:, 0].tolist() == [1.0, 0.0] and spread[0, 0].isnan()
    assert Reduction(torch.zeros(1, 0, dtype=torch.int64)).unmerge(torch.zeros(1, 0, 2), 3).tolist() == [
        [[0.0] * 2] * 3
    ]


def test_protected_tokens_and_a_prefix_do_not_go_together():
    with pytest.raises(ParameterError, match="not both"):
        Reduction(torch.tensor([[0, 3]])).apply(torch.zeros(1, 4, 2), protected=torch.zeros(1, 1, 2), prefix=1)
