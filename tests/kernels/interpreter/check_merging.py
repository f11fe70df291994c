"""Merging rows, and its gradient."""

from __future__ import annotations

import torch
from drawing import DTYPES, close, plan, rows, same

from vlmtok.kernels import reference, table

CHUNK = table.Tile("merge_rows", 4, 1 << 30, 0, 16, 16, 0, 4)  # several steps of entries, several parts of channels


def _merge(k, x, size, merge, tolerance=2e-5, **settings):
    expected = reference.merge_rows(x, size, *merge, **settings)
    for config in (None, CHUNK):
        same(k.merge.merge_rows(x, size, *merge, config=config, **settings), expected, tolerance)


def merge_means(k):
    for n, r, d in ((2, 1, 8), (26, 18, 20), (5, 0, 17)):
        for dtype in DTYPES:
            size = rows(2, n, 1, seed=2)[..., 0].abs() * 8 + 0.5
            # The interpreter truncates where a GPU rounds to nearest: one unit in the last place of bfloat16.
            tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}[dtype]
            _merge(k, rows(2, n, d, dtype), size, plan(2, n, r), tolerance)


def merge_is_deterministic_and_alone_is_exact(k):
    for dtype in DTYPES:
        x, size = rows(1, 12, 20, dtype), torch.ones(1, 12)
        size[0, 11] = 0
        keep, src, dst = torch.arange(8).unsqueeze(0), torch.tensor([[8, 9, 10, 11]]), torch.tensor([[0, 0, -1, 5]])
        x[0, 10] = float("nan")
        found, total = k.merge.merge_rows(x, size, keep, src, dst)
        assert torch.equal(found[:, 1:], x[:, 1:8]) and found.isfinite().all()
        assert total.tolist() == [[3.0, 1, 1, 1, 1, 1, 1, 1]]
        again, _ = k.merge.merge_rows(x, size, keep, src, dst)
        assert torch.equal(found, again)
    same_rows = rows(1, 1, 20).expand(1, 12, 20).contiguous()
    found, _ = k.merge.merge_rows(same_rows, size + 0.3, keep, src, dst.abs())
    assert torch.equal(found, same_rows[:, :8])


def merge_weights(k):
    for n, r, d in ((9, 4, 20), (8, 18, 7)):
        x, size = rows(2, n, d), rows(2, n, 1, seed=2)[..., 0].abs() + 0.5
        order, _, _ = plan(2, n, 0)
        keep = order[:, : n - 3]
        generator = torch.Generator().manual_seed(1)
        src = torch.randint(0, n, (2, r), generator=generator)
        dst = torch.randint(-1, n - 3, (2, r), generator=generator)
        weights = {"keep_weight": rows(2, n - 3, 1)[..., 0], "src_weight": rows(2, r, 1, seed=1)[..., 0]}
        _merge(k, x, size, (keep, src, dst), **weights)
        _merge(k, rows(2, n + 3, d), torch.ones(2, n + 3), (keep, src, dst), prefix=2, suffix=1, **weights)


def merge_pairs(k):
    """Weights worked out from importance, also where several join, none joins, or an entry is empty."""
    for n, r, d in ((2, 1, 8), (26, 18, 20), (5, 0, 17)):
        for dtype in DTYPES if n == 26 else DTYPES[:1]:
            x, size = rows(2, n + 3, d, dtype), rows(2, n + 3, 1, seed=2)[..., 0].abs() * 4 + 0.5
            importance = rows(2, n, 2, seed=3)[..., 1]
            tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}[dtype]
            _merge(k, x, size, plan(2, n, r), tolerance, importance=importance, prefix=2, suffix=1)
    x, size = rows(1, 4, 8), torch.tensor([[2.0, 1.0, 0.0, 3.0]])
    keep, src, dst = torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[0, -1]])
    found, total = k.merge.merge_rows(x, size, keep, src, dst, importance=torch.tensor([[0.0, 9.0, 0.0, 0.0]]))
    assert torch.equal(found, x[:, :2]) and total.tolist() == [[2.0, 1.0]]  # nothing, or only size 0, joins them


def merge_biased(k):
    """The logarithm of the sizes, whoever works them out."""
    n, r = 26, 18
    keep, src, dst = plan(2, n, r)
    size = rows(2, n + 3, 1, seed=2)[..., 0].abs() * 8 + 0.5
    ways = (
        {},
        {"importance": rows(2, n, 1, seed=3)[..., 0]},
        {"keep_weight": rows(2, n - r, 1)[..., 0], "src_weight": rows(2, r, 1, seed=1)[..., 0]},
    )
    for dtype in DTYPES:
        for way in ways if dtype == torch.float32 else ways[:1]:
            x = rows(2, n + 3, 20, dtype)
            settings = {**way, "prefix": 2, "suffix": 1}
            plain = k.merge.merge_rows(x, size, keep, src, dst, config=CHUNK, **settings)
            for config in (None, CHUNK):
                found = k.merge.merge_rows_biased(x, size, keep, src, dst, config=config, **settings)
                same(found[:2], plain, 0 if config else 2e-5 if dtype == torch.float32 else 3.2e-2)
                assert found[2].dtype == dtype
                expected = reference.log_size(plain[1], dtype)
                close(found[2], expected, {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype])


def merge_ownership(k):
    """The first entry that is not empty owns its token; kept tokens own themselves."""
    x, size = rows(1, 5, 8), torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    keep, src, dst = torch.tensor([[0, 1]]), torch.tensor([[3, 3, 3, 4, 1, 4]]), torch.tensor([[-1, 1, 0, 0, 0, 1]])
    weights = {"keep_weight": torch.ones(1, 2), "src_weight": torch.ones(1, 6)}
    _, total = k.merge.merge_rows(x, size, keep, src, dst, **weights)
    assert total.tolist() == [[1.0 + 16, 2.0 + 8]]


def merge_rows_around(k):
    x, size = rows(2, 15, 20), rows(2, 15, 1, seed=2)[..., 0].abs() + 0.5
    _merge(k, x, size, plan(2, 12, 5), prefix=1, suffix=2)
    _merge(k, x, size, plan(2, 15, 5))
    none = torch.zeros(2, 0, dtype=torch.int64)
    _merge(k, x, size, (none, none, none), prefix=10, suffix=5)
    _merge(k, x, size, (none, torch.ones(2, 3, dtype=torch.int64), -torch.ones(2, 3, dtype=torch.int64)), prefix=4)


def merge_empty(k):
    """An empty entry may name no token, and what it would read goes nowhere."""
    x = rows(2, 5, 8)
    x[:, 0] = float("inf")
    keep, src, dst = torch.tensor([[0, 1]] * 2), torch.tensor([[-1, 3, -1]] * 2), torch.tensor([[-1, 1, -1]] * 2)
    size, weight = torch.ones(2, 5), {"keep_weight": torch.ones(2, 2), "src_weight": torch.full((2, 3), 0.5)}
    for settings in ({}, weight, {"importance": rows(2, 5, 1)[..., 0]}):
        _merge(k, x, size, (keep, src, dst), **settings)
        assert k.merge.merge_rows(x, size, keep, src, dst, **settings)[0][:, 0].isinf().all()


def merge_views(k):
    wide = rows(2, 26, 20)[:, ::2]
    keep, src, dst = plan(2, 13, 5)
    size = torch.stack([torch.arange(13.0) + 1, torch.arange(13.0)], -1).expand(2, 13, 2)[..., 0]
    strided = torch.stack([keep, keep], -1)[..., 1]
    _merge(k, wide, size, (strided, src.t().contiguous().t(), dst))
    _merge(k, wide.transpose(1, 2).contiguous().transpose(1, 2), size, (keep, src, dst))
    _merge(k, wide[:1].expand(2, 13, 20), size, (keep[:1].expand(2, 8), src, dst))
    assert k.merge.merge_rows(wide[:0], size[:0], keep[:0], src[:0], dst[:0])[0].shape == (0, 8, 20)
    assert k.merge.merge_rows(wide[..., :0], size, keep, src, dst)[1].shape == (2, 8)


def merge_gradient(k):
    for n, r in ((12, 20), (12, 0)):
        keep, src, dst = plan(2, n, 4, repeats=True)
        src, dst = src.repeat(1, 5)[:, :r], dst.repeat(1, 5)[:, :r].roll(1, 1)
        kw, sw = rows(2, 8, 1)[..., 0], rows(2, r, 1, seed=1)[..., 0]
        grad = rows(2, 8 + 3, 20, seed=5)
        expected = reference.merge_rows_grad(grad, keep, src, dst, kw, sw, n + 3, 2, 1)
        for config in (None, CHUNK):
            found = k.merge_grad.merge_rows_grad(grad, keep, src, dst, kw, sw, n + 3, 2, 1, config=config)
            close(found, expected, 1e-5)
