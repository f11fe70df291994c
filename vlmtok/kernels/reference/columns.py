"""Sums of attention by key-value head and key, over sets of query rows, and what rows may look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..exact import exact
from .attention import logits_of_rows

CHUNK = 128
"""Rows of queries whose attention is held at a time; of any batch, so that its sums are those of each row alone."""


def causal_column_sums(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    at: Tensor | None = None,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    cap: float | None = None,
    sets: Sequence[Tensor | None] = (None,),
) -> Tensor:
    """Definition of `vlmtok.kernels.causal_column_sums`."""
    batch, heads, rows, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    total = q.new_zeros(batch, len(sets), groups, keys, dtype=torch.float32)
    if not total.numel() or not heads:
        return total
    if at is None:
        at = torch.arange(keys - rows, keys, device=q.device).expand(batch, -1)
    with exact(q.device):
        for first in range(0, rows, CHUNK):
            last = min(first + CHUNK, rows)
            hidden, bias = _sight(at[:, first:last], keys, valid, mask)
            logits = logits_of_rows(q[:, :, first:last], k, scale, bias, cap)
            if hidden is None:
                attention = logits.softmax(-1)
            else:  # filled twice, so that what is NaN reaches nothing but what looks at it
                attention = logits.masked_fill_(hidden, float("-inf")).softmax(-1).masked_fill_(hidden, 0.0)
            for place, members in enumerate(sets):
                own = attention if members is None else _of_members(attention, members, first - rows)
                if own.shape[2]:
                    total[:, place] += per_key_head(own.sum(2), groups)
    return total


def _of_members(attention: Tensor, members: Tensor, first: int) -> Tensor:
    """Rows of a set, zeros in the place of others; members are the last rows, `first` counts from their end."""
    begin = max(first, -members.shape[1])
    end = first + attention.shape[2]
    if begin >= end:
        return attention[:, :, :0]
    chosen = members[:, begin + members.shape[1] : end + members.shape[1], None]
    return torch.where(chosen[:, None], attention[:, :, begin - first :], 0.0)


def per_key_head(x: Tensor, groups: int) -> Tensor:
    """Means over the heads that share keys.

    Args:
        x: `[B, H, ...]`.
        groups: Hkv.

    Returns:
        `[B, Hkv, ...]`.
    """
    return x.unflatten(1, (groups, -1)).mean(2)


def row_bias(at: Tensor, keys: int, *, valid: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """What some rows may look at, as what is added to their logits.

    Args:
        at: int64 `[B, R]`, place of each row among the keys.
        keys: S.
        valid: bool `[B, S]`, keys that are no padding, or None where all are.
        mask: bool or floating `[B or 1, 1, L, S]`, what a layer was told of the rows of its last L keys: which keys
            each sees, or what is added to its logits. It says all. None: a row sees valid keys up to its own.

    Returns:
        fp32 `[B, 1, R, S]`, -inf where a row does not look.
    """
    hidden, bias = _sight(at, keys, valid, mask)
    return bias if bias is not None else torch.where(hidden, float("-inf"), 0.0)  # type: ignore[arg-type]


def _sight(at: Tensor, keys: int, valid: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where rows do not look, bool, or what is added to their logits, fp32, both `[B, 1 or H, R, S]`; one of both."""
    if mask is not None:
        index = (at - (keys - mask.shape[2]))[:, None, :, None].expand(-1, mask.shape[1], -1, keys)
        told = mask.expand(at.shape[0], -1, -1, -1).gather(2, index)
        return (~told, None) if told.dtype == torch.bool else (None, told.float())
    look = torch.arange(keys, device=at.device)[None, None, :] <= at[:, :, None]
    if valid is not None:
        look = look & valid[:, None]
    return ~look[:, None], None
