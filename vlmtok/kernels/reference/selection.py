"""Choosing rows one after the other, each far from those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import exact
from .looking import host_may_look
from .rows import finite_unit_rows, square_products
from .steps import in_one, in_steps

_LAST = 1e30  # above every state of the greedy choice
_FAR = 1.7e38  # squared lengths from here on have a double that overflows


def greedy_select(
    x: Tensor,
    k: int,
    start: Tensor | None,
    *,
    rule: str = "max",
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.greedy_select`."""
    batch, n, _ = x.shape
    if k == 0:
        return x.new_empty(batch, 0, dtype=torch.int64), x.new_empty(batch, 0, dtype=torch.float32)
    with exact(x.device):
        if metric == "cosine":
            unit, finite, _ = finite_unit_rows(x)
            gram, late = square_products(unit), ~finite
        else:
            wide = x.float()
            square = (wide * wide).sum(-1)
            gram = square_products(wide).mul_(2.0).sub_(square.unsqueeze(2)).sub_(square.unsqueeze(1))
            late = ~(square < _FAR)
            gram.masked_fill_(~gram.isfinite(), 0.0)
        if start is None:
            start = most_isolated(_nearest_other(gram, late if valid is None else late | ~valid), valid)
        # A row that is to be taken late has a state that no similarity reaches and that none changes: 1e30 where it is
        # not finite, 2e30 where it is not valid, infinity once it is chosen.
        rows = gram.reshape(batch * n, n)
        offset = torch.arange(0, batch * n, n, device=x.device)
        state = rows.index_select(0, start + offset).masked_fill_(late, _LAST)
        if valid is not None:
            state.masked_fill_(~valid, 2.0 * _LAST)
        state.scatter_(1, start.unsqueeze(1), float("inf"))
        order, value = [start], [state.new_full((batch,), float("nan"))]
        for _ in range(k - 1):
            least, pick = state.min(1)
            order.append(pick)
            value.append(least)
            row = rows.index_select(0, pick + offset)
            state = state.add_(row) if rule == "sum" else torch.maximum(state, row, out=state)
            state.scatter_(1, pick.unsqueeze(1), float("inf"))
        taken = torch.stack(value, 1)
        return torch.stack(order, 1), taken.masked_fill_(taken >= _LAST, float("nan"))


def _nearest_other(table: Tensor, out: Tensor) -> Tensor:
    """The greatest similarity of each row with another one that counts, as of `match_max`; of one that is out, -inf.

    What the table says of a row with itself is overwritten.
    """
    batch, n, _ = table.shape
    none, found = float("-inf"), []
    table.diagonal(0, 1, 2).fill_(none)
    if host_may_look(table) and not out.any():
        return table.amax(2)
    for pictures, rows in in_steps(batch, n, n, table.device.type):
        found.append(table[pictures, rows].masked_fill(out[pictures].unsqueeze(1), none).amax(2))
    return in_one(found, table.shape[:2]).masked_fill(out, none)


def most_isolated(nearest: Tensor, valid: Tensor | None = None) -> Tensor:
    """The row whose nearest other row is the farthest away.

    Args:
        nearest: fp32 `[B, N]`, similarity of each row with the nearest other one; -inf where there is none.
        valid: bool `[B, N]`, rows that may be it; None means all.

    Returns:
        int64 `[B]`; the lowest index wins a tie.
    """
    # A row without any other to compare with is not finite, or alone: it loses, or index 0 is all there is.
    alone = nearest.isneginf() if valid is None else nearest.isneginf() | ~valid
    return nearest.masked_fill(alone, float("inf")).argmin(1)
