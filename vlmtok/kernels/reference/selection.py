"""Choosing rows one after the other, each far from those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import exact
from .rows import products, unit_rows

_LAST = 1e30  # above every state of the greedy choice
_FAR = 1.7e38  # squared lengths from here on have a double that overflows


def greedy_select(
    x: Tensor,
    k: int,
    start: Tensor,
    *,
    rule: str = "max",
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.greedy_select`."""
    batch, n, _ = x.shape
    if k == 0:
        return start.new_empty(batch, 0), x.new_empty(batch, 0, dtype=torch.float32)
    with exact(x.device):
        if metric == "cosine":
            unit = unit_rows(x)
            gram = products(unit, unit)
            late = gram.diagonal(dim1=1, dim2=2).isnan()
            gram.masked_fill_(gram.isnan(), 0.0)
        else:
            wide = x.float()
            square = (wide * wide).sum(-1)
            gram = products(wide, wide).mul_(2.0).sub_(square.unsqueeze(2)).sub_(square.unsqueeze(1))
            late = ~(square < _FAR)
            gram.masked_fill_(~gram.isfinite(), 0.0)
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
