"""Choosing rows one after the other, by the determinant of their cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import exact
from .determinant_rows import choose_by_rows
from .determinant_state import GONE, SPANNED, beginning, gains, keys
from .looking import host_may_look
from .rows import finite_unit_rows, products

TABLE_BYTES = 256 << 20
"""Bytes of products of all rows with all that are held at a time; a picture beyond multiplies a row a round."""


def greedy_determinant(
    x: Tensor, k: int, *, relevance: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.greedy_determinant`: in rounds, or on a CPU what multiplies fewer rows."""
    batch, n, _ = x.shape
    if k == 0 or batch == 0:
        return x.new_empty(batch, k, dtype=torch.int64), x.new_empty(batch, k, dtype=torch.float32)
    with exact(x.device):
        unit, finite, long = finite_unit_rows(x)
        square, left, behind = beginning(finite, long, relevance, valid)
        if host_may_look(x):
            chosen = [choose_by_rows(unit[i], square[i], left[i], behind[i], k) for i in range(batch)]
            return torch.stack([order for order, _ in chosen]), torch.stack([gain for _, gain in chosen])
        group = pictures_at_a_time(batch, n)
        parts = [slice(at, at + group) for at in range(0, batch, group)]
        chosen = [_in_rounds(unit[part], square[part], left[part], behind[part], k) for part in parts]
        return torch.cat([order for order, _ in chosen]), torch.cat([gain for _, gain in chosen])


def has_table(n: int) -> bool:
    """Whether the products of all n rows of a picture are held; by n alone, so that bits do not depend on the batch."""
    return 4 * n * n <= TABLE_BYTES


def pictures_at_a_time(batch: int, n: int) -> int:
    """Pictures whose tables are held at a time; all of them while torch traces, and where there are none."""
    if torch.compiler.is_compiling() or not has_table(n):
        return batch
    return max(1, TABLE_BYTES // (4 * n * n))


def _in_rounds(unit: Tensor, square: Tensor, left: Tensor, behind: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rule itself, without a look at what is chosen.

    Args:
        unit: fp32 `[B, N, D]`, rows of length one or zero.
        square: fp32 `[B, N]`, as the two that follow what `beginning` gives.
        left: fp32 `[B, N]`.
        behind: int32 `[B, N]`.
        k: how many.

    Returns:
        The choice, int64 `[B, k]`, and the gains, fp32 `[B, k]`.
    """
    batch, n, _ = unit.shape
    lane = torch.arange(batch, device=unit.device)
    table = products(unit, unit) if has_table(n) else None
    factors = unit.new_zeros(batch, k, n)
    order, top = [], []
    for t in range(k):
        best, pick = keys(square, left, behind).max(1)
        order.append(pick)
        top.append(best)
        row = table[lane, pick] if table is not None else (unit @ unit[lane, pick].unsqueeze(2)).squeeze(2)
        if t:
            past = factors[:, :t]
            row = row - (past[lane, :, pick].unsqueeze(1) @ past).squeeze(1)
        step = row / left[lane, pick].clamp(min=SPANNED).sqrt().unsqueeze(1)
        step = torch.where((best >= 0).unsqueeze(1), step, 0.0)  # a spanned row leaves the others as they are
        factors[:, t] = step
        left = (left - step * step).scatter(1, pick.unsqueeze(1), 0.0)
        behind = behind.scatter(1, pick.unsqueeze(1), GONE)
    return torch.stack(order, 1), gains(torch.stack(top, 1))
