"""Every op on a GPU, on drawn inputs of one size."""

import torch

from vlmtok import kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = (
    "match halves", "match complete", "match long", "energy", "energy long", "bipartite", "energy match",
    "complete match", "guided match", "merge", "merge weights", "merge pairs", "greedy", "greedy sum", "greedy l2",
    "greedy cover", "greedy cover table", "determinant", "determinant masked", "duplicates", "duplicates lengths",
    "transition", "received", "columns", "columns sets", "columns mask",
)  # fmt: skip


def rows(batch, n, d, dtype=torch.float32, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, d, generator=generator).to(device, dtype)


def plan(batch, n, r, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)]).to(device)
    return order[:, r:], order[:, :r], torch.randint(-1, n - r, (batch, r), generator=generator).to(device)


def calls(batch=2, n=577, d=64, dtype=torch.bfloat16, device="cuda"):
    """Every op on inputs of one size."""
    x, wide = rows(batch, n, d, dtype, device=device), rows(batch, n, 1024, dtype, 1, device)
    size = rows(batch, n, 1, seed=2, device=device)[..., 0].abs() + 0.5
    keep, src, dst = plan(batch, n, n // 4, device=device)
    kw, sw = torch.rand(keep.shape, device=device), torch.rand(src.shape, device=device)
    q, k = (
        rows(batch * 4, n, d, dtype, 3, device).reshape(batch, 4, n, d),
        rows(batch * 2, n, d, dtype, 4, device).reshape(batch, 2, n, d),
    )
    start = torch.arange(batch, device=device)
    bias = size.log()[:, None, None].to(dtype)
    order = torch.cat([keep, src], 1)
    seen = (torch.arange(n, device=device) >= start[:, None] % n)[:, None, None]
    seen = seen.expand(-1, 1, n, -1)
    return {
        "match halves": lambda: kernels.match_max(x[:, ::2], x[:, 1::2]),
        "match complete": lambda: kernels.match_max(x, x, exclude_diag=True),
        "match long": lambda: kernels.match_max(wide, wide, exclude_diag=True),
        "energy": lambda: kernels.energy(x, margin=0.1),
        "energy long": lambda: kernels.energy(wide, margin=0.1, kind="paper"),
        "bipartite": lambda: kernels.bipartite_match(x, n // 8, 1),
        "energy match": lambda: kernels.energy_match(x, n // 8, margin=0.1),
        "complete match": lambda: kernels.complete_match(x, torch.zeros_like(size), n // 8),
        "guided match": lambda: kernels.guided_match(x, x[:, 0], n // 8),
        "merge": lambda: kernels.merge_rows(wide, size, keep, src, dst),
        "merge weights": lambda: kernels.merge_rows(wide, size, keep, src, dst, keep_weight=kw, src_weight=sw),
        "merge pairs": lambda: kernels.merge_rows_biased(wide, size, keep, src, dst, importance=size),
        "greedy": lambda: kernels.greedy_select(x, n // 8, start),
        "greedy sum": lambda: kernels.greedy_select(x, n // 8, start, rule="sum"),
        "greedy l2": lambda: kernels.greedy_select(x, n // 8, start, metric="l2"),
        "greedy cover": lambda: kernels.greedy_cover_cosine(x, n // 8, weight=size),
        "greedy cover table": lambda: kernels.greedy_cover(wide.abs(), n // 8, late=order % 2),
        "determinant": lambda: kernels.greedy_determinant(wide, n // 8, relevance=size),
        "determinant masked": lambda: kernels.greedy_determinant(wide, n // 8, valid=size > 0.9, split=2),
        "duplicates": lambda: kernels.drop_duplicates(x, n // 2 + 1),
        "duplicates lengths": lambda: kernels.drop_duplicates(x, n // 3, step=50, valid=size > 0.6),
        "transition": lambda: kernels.transition_stats(wide, wide.flip(1)),
        "received": lambda: kernels.received_attention(q, k, scale=d**-0.5, bias=bias),
        "columns": lambda: kernels.causal_column_sums(q, k, scale=d**-0.5, valid=seen[:, 0, 0]),
        "columns sets": lambda: kernels.causal_column_sums(
            q, k, scale=d**-0.5, at=order.argsort(1), cap=20.0, sets=[None, size > 1, (size > 1)[:, n // 2 :]]
        ),
        "columns mask": lambda: kernels.causal_column_sums(
            q, k, scale=d**-0.5, mask=seen | (order == 0)[:, None, None]
        ),
    }


def both(call):
    with kernels.use("triton"):
        found = call()
    with kernels.use("torch"):
        expected = call()
    return [[out] if isinstance(out, torch.Tensor) else list(out) for out in (found, expected)]
