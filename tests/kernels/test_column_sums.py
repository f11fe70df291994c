"""The definition of head-wise sums of attention over sets of rows, against naive loops in double precision."""

import naive
import pytest
import torch
from drawn import NONE, rows

from vlmtok import kernels
from vlmtok.kernels.reference import columns


def heads(batch, n, count, d=8, seed=0):
    return rows(batch * n, count, d, seed=seed).reshape(batch, n, count, d)


def naive_sums(q, k, scale, look, cap=None, added=None, members=None):
    """Row by row: softmax over what a row sees, added to each key, heads that share keys averaged."""
    batch, n, count, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    total = torch.zeros(batch, groups, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(n):
            for r in range(count):
                seen = look[b, r].nonzero()[:, 0]
                if not len(seen) or (members is not None and not members[b, r]):
                    continue
                logits = (k[b, h // (n // groups)].double() @ q[b, h, r].double()) * scale
                if cap is not None:
                    logits = cap * torch.tanh(logits / cap)
                if added is not None:
                    logits = logits + added[b, 0, r].double()
                total[b, h // (n // groups), seen] += logits[seen].softmax(0) / (n // groups)
    return total


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_last_rows_of_more_keys(cap):
    q, k = heads(2, 4, 6), heads(2, 2, 9, seed=1)
    look = torch.ones(6, 9).tril(3).bool().expand(2, -1, -1)
    found = kernels.causal_column_sums(q, k, scale=0.4, cap=cap)
    close(found[:, 0], naive_sums(q, k, 0.4, look, cap))
    torch.testing.assert_close(found.sum((1, 3)), torch.full((2, 2), 6.0))


def test_places_padding_and_sets():
    q, k = heads(2, 4, 7), heads(2, 2, 9, seed=1)
    at = torch.tensor([[8, 0, 3, 3, 5, 1, 7], [2, 8, 6, 4, 8, 0, 5]])
    valid = torch.arange(9) >= torch.tensor([[0], [3]])  # two rows of the second stand in its padding
    look = (torch.arange(9) <= at[:, :, None]) & valid[:, None]
    last, some = torch.ones(2, 3, dtype=torch.bool), at % 2 == 0
    found = kernels.causal_column_sums(q, k, scale=0.4, at=at, valid=valid, sets=[None, last, some])
    for place, members in enumerate((None, torch.nn.functional.pad(last, (4, 0)), some)):
        close(found[:, place], naive_sums(q, k, 0.4, look, members=members))
    assert found[1, :, :, :3].eq(0).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_mask_says_all(batch):
    """Bool and floating, read at the rows that places name; rows that see ahead do."""
    q, k = heads(2, 4, 5), heads(2, 2, 9, seed=1)
    at, generator = torch.tensor([[8, 4, 5, 5, 7], [3, 3, 8, 4, 6]]), torch.Generator().manual_seed(0)
    seen = torch.rand(batch, 1, 6, 9, generator=generator) > 0.5
    seen[..., 8] = True  # a key that is behind most rows
    rows_of = (at - 3)[:, None, :, None].expand(-1, 1, -1, 9)
    own = seen.expand(2, -1, -1, -1).gather(2, rows_of)
    close(kernels.causal_column_sums(q, k, scale=0.4, at=at, mask=seen)[:, 0], naive_sums(q, k, 0.4, own[:, 0]))
    added = torch.where(seen, torch.randn(seen.shape, generator=generator), NONE)
    expected = naive_sums(q, k, 0.4, own[:, 0], added=added.expand(2, -1, -1, -1).gather(2, rows_of))
    close(kernels.causal_column_sums(q, k, scale=0.4, at=at, mask=added)[:, 0], expected)


def test_more_rows_than_are_held_at_a_time():
    """The sums of chunks, and of a set that begins and ends inside of them, are those of all rows together."""
    count = columns.CHUNK + 40
    q, k = heads(1, 2, count), heads(1, 1, count, seed=1)
    attention = naive.attention(
        q, k, 0.4, torch.zeros(count, count).masked_fill(~torch.ones(count, count).tril().bool(), NONE)
    )
    for width in (20, 40, 41, 100, count):
        members = torch.rand(1, width, generator=torch.Generator().manual_seed(width)) > 0.5
        found = kernels.causal_column_sums(q, k, scale=0.4, sets=[members, None])
        chosen = attention[:, :, count - width :][:, :, members[0]]
        close(found, torch.stack([chosen.sum(2), attention.sum(2)], 1).mean(2, keepdim=True))


def test_one_set_is_what_attention_rows_gives():
    """Bit for bit: the sums that caches had before there was an op for them."""
    q, k = heads(2, 4, 40), heads(2, 2, 40, seed=1)
    at = torch.arange(40).expand(2, -1)
    attention = kernels.attention_rows(q, k, scale=0.4, bias=kernels.row_bias(at, 40))
    expected = torch.zeros(2, 2, 40) + kernels.per_key_head(attention.sum(2), 2)
    assert torch.equal(kernels.causal_column_sums(q, k, scale=0.4)[:, 0], expected)


def test_a_nan_reaches_what_its_row_sees():
    q, k = heads(1, 2, 6), heads(1, 1, 6, seed=1)
    bad = q.clone()
    bad[0, 1, 2] = float("nan")
    found = kernels.causal_column_sums(bad, k, scale=0.4, sets=[None, torch.arange(6)[None] != 2])
    assert found[0, 0, 0].isnan().tolist() == [True] * 3 + [False] * 3 and found[0, 1].isfinite().all()
    k[0, 0, 0] = float("nan")
    assert kernels.causal_column_sums(q, k, scale=0.4, valid=torch.arange(6)[None] > 0).isfinite().all()


def test_a_batch_is_its_rows():
    q, k = heads(3, 4, 140), heads(3, 2, 150, seed=1)
    valid = torch.arange(150) >= torch.tensor([[0], [20], [90]])
    whole = kernels.causal_column_sums(q, k, scale=0.4, valid=valid)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], kernels.causal_column_sums(q[one], k[one], scale=0.4, valid=valid[one]))


@pytest.mark.parametrize(("groups", "most"), [(2, 3), (4, 2)])
def test_launches(groups, most):
    """Two passes, and one for the mean of heads that share keys; the places of the queries are one op more."""
    from count_ops import CountOps

    q, k = (torch.empty(1, n, 640, 64, dtype=torch.bfloat16, device="meta") for n in (4, groups))
    with kernels.use("triton"), CountOps() as count:
        kernels.causal_column_sums(q, k, scale=0.1, at=torch.empty(1, 640, dtype=torch.int64, device="meta"))
    assert count.total == most, count
    assert count.ops["triton _rows_kernel"] == count.ops["triton _columns_kernel"] == 1
