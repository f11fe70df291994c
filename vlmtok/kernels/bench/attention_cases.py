"""Cases of ops that read attention: means and sums over its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .drawing import features
from .floors import Case, Rival

COLREDUCE = Rival(
    "flash_colreduce", "flash-colreduce", lambda m, q, k: m.flash_colreduce(q, k, reduction="mean").float().mean(1)
)
"""Column means of each head (flash-colreduce, MIT, the kernel of SparseVILA); the mean over heads is torch's."""


def received(n: int, heads: int, d: int, batch: int) -> Case:
    """Column means of one attention of a language model's width: sizes that flash-colreduce is reported at."""

    def pair(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return features(device, dtype, batch, heads, n, d), features(device, dtype, batch, heads, n, d)

    return Case(
        "received_attention", f"N={n}, {heads} heads of {d}", batch, pair,
        lambda m, q, k: m.received_attention(q, k, scale=d**-0.5),
        4 * batch * heads * n * d + 4 * batch * n, 4 * batch * heads * n * n * d, 3, rivals=(COLREDUCE,),
    )  # fmt: skip


def cached(n: int, heads: int, groups: int, d: int, batch: int) -> Case:
    """What methods of a cache read of one layer: sums over all rows of the prompt and over its last 64, in one pass."""

    def pair(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (features(device, dtype, batch, count, n, d) for count in (heads, groups))
        return q, k, torch.ones(batch, min(n, 64), dtype=torch.bool, device=device)

    # Two passes over the half of the pairs that causality leaves. Beside the kernels' launches: places of the queries,
    # and the table of the sets (ones, a pad, a stack).
    return Case(
        "causal_column_sums", f"N={n}, {heads} heads of {d} on {groups}", batch, pair,
        lambda m, q, k, last: m.causal_column_sums(q, k, scale=d**-0.5, sets=[None, last]),
        2 * batch * (heads + groups) * n * d + 8 * batch * groups * n, 2 * batch * heads * n * n * d,
        6 + (groups < heads),
    )  # fmt: skip
