"""Right answers or one clear error, on the torch path; `interpreter/` does the same for the kernels."""

import pytest
import torch

from vlmtok import kernels
from vlmtok.errors import ParameterError

X = torch.randn(2, 6, 8)
LONG = torch.arange(3).expand(2, 3)
Q = torch.randn(2, 4, 6, 8)


def bad_calls():
    meta = X.to("meta")
    merge = (X, torch.ones(2, 6), LONG, LONG + 3, LONG)

    def merged(at, value, **weights):
        args = list(merge)
        args[at] = value
        return lambda: kernels.merge_rows(*args, **weights)

    return {
        "match: integers": (lambda: kernels.match_max(X.long(), X), "floating"),
        "match: axes": (lambda: kernels.match_max(X[0], X), "floating \\[B, M, D\\]"),
        "match: widths": (lambda: kernels.match_max(X, X[..., :4]), "agree"),
        "match: batches": (lambda: kernels.match_max(X[:1], X), "agree"),
        "match: devices": (lambda: kernels.match_max(X, meta), "is on meta"),
        "match: one rank": (lambda: kernels.match_max(X, X, rank_a=torch.zeros(2, 6).long()), "together"),
        "match: rank dtype": (lambda: kernels.match_max(X, X, rank_a=X[..., 0], rank_b=X[..., 0]), "int64 or int32"),
        "match: mask dtype": (lambda: kernels.match_max(X, X, valid_b=torch.ones(2, 6)), "bool"),
        "match: mask shape": (lambda: kernels.match_max(X, X, valid_b=torch.ones(2, 5).bool()), "\\[2, 6\\]"),
        "energy: integers": (lambda: kernels.energy(X.int(), margin=0.5), "floating"),
        "energy: kind": (lambda: kernels.energy(X, margin=0.5, kind="relu"), "elu"),
        "energy: width 0": (lambda: kernels.energy(X, margin=1.0, kind="gaussian"), "< 1"),
        "bipartite: r": (lambda: kernels.bipartite_match(X, 4), "\\[0, 3\\]"),
        "bipartite: negative": (lambda: kernels.bipartite_match(X, -1), "\\[0, 3\\]"),
        "energy match: split": (lambda: kernels.energy_match(X, 2, margin=0.5, split="thirds"), "halves"),
        "complete: importance": (lambda: kernels.complete_match(X, X[:, :3, 0], 2), "\\[2, 6\\]"),
        "guided: query": (lambda: kernels.guided_match(X, X[:, 0, :4], 2), "\\[2, 8\\]"),
        "guided: integers": (lambda: kernels.guided_match(X, X[:, 0].long(), 2), "floating"),
        "guided: r": (lambda: kernels.guided_match(X, X[:, 0], 4), "\\[0, 3\\]"),
        "guided: devices": (lambda: kernels.guided_match(X, meta[:, 0], 2), "is on meta"),
        "merge: importance": (merged(0, X, importance=torch.ones(2, 3)), "\\[2, 6\\]"),
        "merge: importance device": (merged(0, X, importance=meta[..., 0]), "is on meta"),
        "merge: importance and weights": (
            merged(0, X, importance=X[..., 0], keep_weight=torch.ones(2, 3), src_weight=torch.ones(2, 3)), "not both",
        ),
        "merge: integers": (merged(0, X.long()), "floating"),
        "merge: size": (merged(1, torch.ones(2, 5)), "\\[2, 6\\]"),
        "merge: keep dtype": (merged(2, LONG.int()), "int64"),
        "merge: dst shape": (merged(4, LONG[:, :2]), "\\[2, 3\\]"),
        "merge: device": (merged(3, LONG.to("meta")), "is on meta"),
        "merge: one weight": (merged(0, X, keep_weight=torch.ones(2, 3)), "together"),
        "merge: weight shape": (merged(0, X, keep_weight=torch.ones(2, 3), src_weight=torch.ones(2, 2)), "shapes"),
        "merge: rows around": (merged(0, X, prefix=4, suffix=3), "do not fit"),
        "bipartite: integers": (lambda: kernels.bipartite_match(X.long(), 2), "floating"),
        "bipartite: bool": (lambda: kernels.bipartite_match(X, True), "\\[0, 3\\]"),
        "energy match: integers": (lambda: kernels.energy_match(X.long(), 2, margin=0.5), "floating"),
        "complete: integers": (lambda: kernels.complete_match(X.long(), X[..., 0], 2), "floating"),
        "complete: devices": (lambda: kernels.complete_match(X, meta[..., 0], 2), "is on meta"),
        "complete: mask dtype": (lambda: kernels.complete_match(X, X[..., 0], 2, X[..., 0].long()), "bool"),
        "greedy: integers": (lambda: kernels.greedy_select(X.long(), 2, LONG[:, 0]), "floating"),
        "greedy: devices": (lambda: kernels.greedy_select(X, 2, LONG[:, 0].to("meta")), "is on meta"),
        "greedy: mask": (lambda: kernels.greedy_select(X, 2, LONG[:, 0], valid=X[..., 0]), "bool"),
        "cover: integers": (lambda: kernels.greedy_cover(X.long(), 2), "floating \\[B, N, R\\]"),
        "cover: k": (lambda: kernels.greedy_cover(X, 7), "\\[0, 6\\]"),
        "cover: bool": (lambda: kernels.greedy_cover(X, True), "\\[0, 6\\]"),
        "cover: weight": (lambda: kernels.greedy_cover(X, 2, weight=X[:, :3, 0]), "weight must be floating \\[2, 6\\]"),
        "cover: late": (lambda: kernels.greedy_cover(X, 2, late=X[..., 0]), "late must be int64"),
        "cover: mask": (lambda: kernels.greedy_cover(X, 2, valid=X[..., 0]), "bool"),
        "cover: devices": (lambda: kernels.greedy_cover(X, 2, weight=meta[..., 0]), "is on meta"),
        "cover cosine: integers": (lambda: kernels.greedy_cover_cosine(X.long(), 2), "floating"),
        "cover cosine: k": (lambda: kernels.greedy_cover_cosine(X, -1), "\\[0, 6\\]"),
        "cover cosine: weight": (lambda: kernels.greedy_cover_cosine(X, 2, weight=LONG), "weight must be floating"),
        "cover cosine: mask": (lambda: kernels.greedy_cover_cosine(X, 2, valid=meta[..., 0] > 0), "is on meta"),
        "transition: devices": (lambda: kernels.transition_stats(X, meta), "is on meta"),
        "attention: integers": (lambda: kernels.attention_rows(Q.long(), Q, scale=1.0), "floating"),
        "received: integers": (lambda: kernels.received_attention(Q, Q.long(), scale=1.0), "floating"),
        "received: devices": (lambda: kernels.received_attention(Q, Q.to("meta"), scale=1.0), "is on meta"),
        "greedy: k": (lambda: kernels.greedy_select(X, 7, LONG[:, 0]), "\\[0, 6\\]"),
        "greedy: rule": (lambda: kernels.greedy_select(X, 2, LONG[:, 0], rule="min"), "sum"),
        "greedy: metric": (lambda: kernels.greedy_select(X, 2, LONG[:, 0], metric="l1"), "l2"),
        "greedy: sum of distances": (
            lambda: kernels.greedy_select(X, 2, LONG[:, 0], rule="sum", metric="l2"), "cosine",
        ),
        "greedy: start": (lambda: kernels.greedy_select(X, 2, LONG[:, :1]), "\\[2\\]"),
        "determinant: integers": (lambda: kernels.greedy_determinant(X.long(), 2), "floating"),
        "determinant: k": (lambda: kernels.greedy_determinant(X, 7), "\\[0, 6\\]"),
        "determinant: bool": (lambda: kernels.greedy_determinant(X, True), "\\[0, 6\\]"),
        "determinant: relevance": (lambda: kernels.greedy_determinant(X, 2, relevance=X[:, :3, 0]), "\\[2, 6\\]"),
        "determinant: whole relevance": (lambda: kernels.greedy_determinant(X, 2, relevance=LONG), "floating"),
        "determinant: mask": (lambda: kernels.greedy_determinant(X, 2, valid=X[..., 0]), "bool"),
        "determinant: devices": (lambda: kernels.greedy_determinant(X, 2, relevance=meta[..., 0]), "is on meta"),
        "determinant: split": (lambda: kernels.greedy_determinant(X, 2, split=3), "one of 1, 2"),
        "determinant: split by a word": (lambda: kernels.greedy_determinant(X, 2, split=True), "one of 1, 2"),
        "duplicates: integers": (lambda: kernels.drop_duplicates(X.long(), 2), "floating"),
        "duplicates: k": (lambda: kernels.drop_duplicates(X, 4, order=LONG), "\\[0, 3\\]"),
        "duplicates: bool": (lambda: kernels.drop_duplicates(X, True), "\\[0, 6\\]"),
        "duplicates: long list": (lambda: kernels.drop_duplicates(X, 2, order=LONG.repeat(1, 3)), "at most 6"),
        "duplicates: list dtype": (lambda: kernels.drop_duplicates(X, 2, order=LONG.int()), "int64"),
        "duplicates: list devices": (lambda: kernels.drop_duplicates(X, 2, order=LONG.to("meta")), "is on meta"),
        "duplicates: step": (lambda: kernels.drop_duplicates(X, 2, step=0), "at least 1"),
        "duplicates: mask": (lambda: kernels.drop_duplicates(X, 2, valid=torch.ones(2, 5).bool()), "\\[2, 6\\]"),
        "transition: shapes": (lambda: kernels.transition_stats(X, X[:, :3]), "one shape"),
        "transition: integers": (lambda: kernels.transition_stats(X.int(), X), "floating"),
        "attention: heads": (lambda: kernels.attention_rows(Q, Q[:, :3], scale=1.0), "divide"),
        "attention: wide bias": (lambda: kernels.attention_rows(Q, Q, scale=1.0, bias=X.new_zeros(9)), "broadcast"),
        "received: big bias": (lambda: kernels.received_attention(Q, Q, scale=1.0, bias=Q.repeat(2, 1, 1, 1)), "cast"),
        "merge: half sizes": (merged(1, torch.ones(2, 6).half()), "size must be torch.float32"),
        "energy: margin": (lambda: kernels.energy(X, margin=float("nan")), "finite"),
        "attention: bias": (lambda: kernels.attention_rows(Q, Q, scale=1.0, bias=LONG), "bias"),
        "columns: heads": (lambda: kernels.causal_column_sums(Q, Q[:, :3], scale=1.0), "divide"),
        "columns: integers": (lambda: kernels.causal_column_sums(Q, Q.long(), scale=1.0), "floating"),
        "columns: places": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, at=LONG), "\\[2, 6\\]"),
        "columns: too many": (lambda: kernels.causal_column_sums(Q, Q[:, :, :5], scale=1.0), "not the last of 5 keys"),
        "columns: padding": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, valid=X[..., 0]), "bool"),
        "columns: two rules": (
            lambda: kernels.causal_column_sums(Q, Q, scale=1.0, valid=X[..., 0] > 0, mask=Q[..., :6] > 0), "not both",
        ),
        "columns: mask dtype": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, mask=LONG), "bool or floating"),
        "columns: mask rows": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, mask=Q[:, :, :5, :6]), "6 to 6"),
        "columns: mask columns": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, mask=Q[..., :5]), "6 columns"),
        "columns: mask device": (
            lambda: kernels.causal_column_sums(Q, Q, scale=1.0, mask=Q[..., :6].to("meta")), "is on meta",
        ),
        "columns: cap": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, cap=0.0), "positive"),
        "columns: no set": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, sets=[]), "all rows"),
        "columns: a wide set": (
            lambda: kernels.causal_column_sums(Q, Q, scale=1.0, sets=[None, torch.ones(2, 7).bool()]),
            "sets\\[1\\] must be bool \\[2, at most 6\\]",
        ),
        "columns: a set of numbers": (lambda: kernels.causal_column_sums(Q, Q, scale=1.0, sets=[LONG]), "bool"),
        "columns: a set elsewhere": (
            lambda: kernels.causal_column_sums(Q, Q, scale=1.0, sets=[meta[..., 0] > 0]), "is on meta",
        ),
        "received: chunk": (lambda: kernels.received_attention(Q, Q, scale=1.0, chunk=0), "at least 1"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_one_clear_error(case):
    call, message = bad_calls()[case]
    with pytest.raises(ParameterError, match=message):
        call()


def test_views_are_fine():
    wide = torch.randn(2, 8, 12)
    for view in (wide.transpose(1, 2), wide[:, ::2], wide[:, :, ::3], wide[:1].expand(3, -1, -1)):
        same = view.contiguous()
        for a, b in zip(kernels.match_max(view, view.flip(1)), kernels.match_max(same, same.flip(1))):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(kernels.energy(view, margin=0.3), kernels.energy(same, margin=0.3))
        index = torch.arange(2).expand(view.shape[0], 2)
        size = torch.ones(view.shape[0], view.shape[1])
        for a, b in zip(
            kernels.merge_rows(view, size, index, index + 2, index),
            kernels.merge_rows(same, size, index, index + 2, index),
        ):
            assert torch.equal(a, b)


def test_mixed_dtypes_are_computed_in_fp32():
    a, b = X, X.flip(1).to(torch.bfloat16)
    value, index = kernels.match_max(a, b)
    expected = kernels.match_max(a, b.float())
    assert torch.equal(value, expected[0]) and torch.equal(index, expected[1])
    ratio, _ = kernels.transition_stats(a, b)
    torch.testing.assert_close(ratio, b.float().norm(dim=-1) / a.norm(dim=-1))


def test_cosine_of_short_rows_is_torchs():
    for scale in (1.0, 1e-5, 1e-7, 1e-9, 0.0):
        _, cosine = kernels.transition_stats(X * scale, X.flip(1) * 1e-4)
        torch.testing.assert_close(cosine, torch.cosine_similarity(X * scale, X.flip(1) * 1e-4, dim=-1, eps=1e-8))


@pytest.mark.parametrize("batch, n, d", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_nothing_is_fine(batch, n, d):
    x = torch.randn(batch, n, d)
    value, index = kernels.match_max(x, x)
    assert value.shape == index.shape == (batch, n)
    value, index = kernels.match_max(torch.randn(batch, 3, d), x)
    assert index.eq(0).all() and (value.eq(float("-inf")).all() if n == 0 else value.eq(0).all() or d)
    assert kernels.energy(x, margin=0.3).shape == (batch, n)
    start = torch.zeros(batch, dtype=torch.int64)
    assert kernels.greedy_select(x, 0, start)[0].shape == (batch, 0)
    for cover in (kernels.greedy_cover, kernels.greedy_cover_cosine):
        assert cover(x, 0)[0].shape == (batch, 0)
        order, gain = cover(x, n)
        assert order.shape == gain.shape == (batch, n) and torch.equal(
            order.sort(1).values, torch.arange(n).expand(batch, n)
        )
    assert kernels.greedy_determinant(x, n)[0].shape == (batch, n)
    assert kernels.greedy_determinant(x, n, split=2)[0].shape == (batch, n)
    assert kernels.drop_duplicates(x, n // 2).shape == (batch, n // 2)
    for keep, src, dst in (
        kernels.bipartite_match(x, n // 2, 1),
        kernels.energy_match(x, n // 2, margin=0.3),
        kernels.complete_match(x, torch.zeros(batch, n), 0),
    ):
        assert keep.shape[1] + src.shape[1] == n and dst.shape == src.shape
    none = torch.zeros(batch, 0, dtype=torch.int64)
    size = torch.ones(batch, n)
    everything = torch.arange(n).expand(batch, n)
    rows, total = kernels.merge_rows(x, size, everything, none, none)
    assert torch.equal(rows, x) and torch.equal(total, size)
    rows, total = kernels.merge_rows(x, size, none, none, none)
    assert rows.shape == (batch, 0, d) and total.shape == (batch, 0)
    weights = {"keep_weight": torch.full((batch, n), 2.0), "src_weight": none.float()}
    assert torch.equal(kernels.merge_rows(x, size, everything, none, none, **weights)[0], 2 * x)
    assert kernels.transition_stats(x, x)[0].shape == (batch, n)
    q = torch.randn(batch, 2, n, d)
    assert kernels.attention_rows(q, q, scale=1.0).shape == (batch, 2, n, n)
    assert kernels.received_attention(q, q, scale=1.0).shape == (batch, n)
    assert kernels.causal_column_sums(q, q, scale=1.0, sets=[None, None]).shape == (batch, 2, 2, n)


@pytest.mark.parametrize("index", [6, -1])
def test_an_index_outside_is_an_error_on_a_cpu(index):
    with pytest.raises((RuntimeError, IndexError), match="out of (bounds|range)"):
        kernels.greedy_select(X, 3, torch.tensor([0, index]))
    keep, outside = LONG, torch.tensor([[3], [index]])
    with pytest.raises((RuntimeError, IndexError), match="out of (bounds|range)"):
        kernels.merge_rows(X, torch.ones(2, 6), keep, outside, torch.zeros_like(outside))
