"""How the greedy choice by determinants tells its rows apart, on every path."""

from __future__ import annotations

import torch
from torch import Tensor

SPANNED = 1e-6
"""A row counts as spanned by those chosen where they leave so much or less of its variance, which is 1 at first."""

BEHIND = 0x7F800000
"""The bits of infinity: above those of every weight, so that a weight's bits less these are negative and keep order."""

GONE = -0x80000000
"""The place of a row that is chosen."""


def beginning(
    finite: Tensor, long: Tensor, relevance: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the choice begins with.

    Args:
        finite: bool `[B, N]`, rows whose length is finite.
        long: bool `[B, N]`, those of them that are not zero.
        relevance: floating `[B, N]`, or None.
        valid: bool `[B, N]`, or None.

    Returns:
        fp32 `[B, N]`, the squares of the factors; fp32 `[B, N]`, the variance that is left of each row, 1 or 0; int32
        `[B, N]`, negative, the place of a row without variance: by its factor, behind them rows that are not finite,
        behind those that are not valid, both by index.
    """
    n = finite.shape[1]
    if relevance is None:
        weight = torch.ones_like(finite, dtype=torch.float32)
    else:
        weight = relevance.float().nan_to_num(nan=0.0).clamp(min=0.0) + 0.0  # the bits of -0 are no place
    free = finite if valid is None else finite & valid
    index = torch.arange(n, device=finite.device, dtype=torch.int32)
    late = -BEHIND - 1 - index
    if valid is not None:
        late = torch.where(valid, late, late - n)
    behind = torch.where(free, weight.view(torch.int32) - BEHIND, late)
    return weight * weight, (free & long).float(), behind


def keys(square: Tensor, left: Tensor, behind: Tensor, out: Tensor | None = None) -> Tensor:
    """One integer a row, of which the greatest is next: the bits of its gain, which is not negative, or its place."""
    return torch.where(left > SPANNED, (square * left).view(torch.int32), behind, out=out)


def gains(key: Tensor) -> Tensor:
    """The gains in the keys of what was chosen; NaN for places behind."""
    return torch.where(key >= 0, key.view(torch.float32), float("nan"))
