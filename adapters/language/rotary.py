"""Position embeddings of some columns, in whatever container the host hands them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def last_of(rotary: Any, count: int) -> Any:
    """Position embeddings of the last columns: hosts let layers that store no keys look at the last tokens only."""
    if isinstance(rotary, (tuple, list)):
        return tuple(last_of(part, count) for part in rotary)
    return rotary if rotary.shape[1] == count else rotary[:, -count:]


def gather_rotary(rotary: Any, columns: Tensor, rows: Tensor | None = None) -> Any:
    """Position embeddings of some columns: a pair, or one tensor, `[B or 1, L, D]`, gathered on dim -2.

    Args:
        rotary: what the host hands its layers.
        columns: int64 `[B, R]`.
        rows: int64 `[B]`, rows that the columns are of; None means all.
    """
    if rotary is None:
        return None
    if isinstance(rotary, (tuple, list)):
        return tuple(gather_rotary(part, columns, rows) for part in rotary)
    part: Tensor = rotary
    if part.shape[0] == 1:
        part = part.expand(columns.shape[0], *part.shape[1:])
    elif rows is not None:
        part = part[rows]
    return part.gather(1, columns.unsqueeze(-1).expand(-1, -1, part.shape[-1]))
