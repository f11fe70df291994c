"""Entries of a key-value cache leave: what a layer holds behind the reductions of its views.

Kept entries keep their order and the positions by which their keys were turned. Rows are aligned to the right, so that
the last columns of all layers are the same tokens; what stands in front of a shorter row is marked as no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .reduction import Reduction


@dataclass(frozen=True, eq=False)
class Piece:
    """What leaves of some view rows.

    Attributes:
        index: int64 `[G]`, row of the batch of each.
        columns: int64 `[G, N]`, where their entries stand in the cache, padding included.
        reduction: of `[G, N]`, or of `[G Hkv, N]` where each key-value head has its own.
        size: fp32 of `[G, N]`, or as the reduction's rows are, patches that each stands for, by which means are
            weighted; or None for ones.
        weighted: whether keys merge as values do.
        proportional: whether merged entries get log(size) in later attention.
    """

    index: Tensor
    columns: Tensor
    reduction: Reduction
    size: Tensor | None = None
    weighted: bool = False
    proportional: bool = False


@dataclass(frozen=True, eq=False)
class Entries:
    """What one layer's cache holds.

    Attributes:
        keys: `[B, Hkv, n, d]`.
        values: `[B, Hkv, n, d]`.
        valid: bool `[B, n]`, or None while all are real.
        bias: fp32 `[B, Hkv, n]`, log of the sizes of merged entries, or None while nothing is merged so.
        blocks: int64 `[B, n]`, bidirectional block of each, or None.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
    bias: Tensor | None = None
    blocks: Tensor | None = None


def staying(entries: Entries, pieces: Sequence[Piece], lost: Tensor | None) -> Tensor:
    """Which entries stay.

    Args:
        entries: of the layer.
        pieces: what its methods answered; they do not overlap.
        lost: bool `[B, n]`, entries that leave besides, or None.

    Returns:
        bool `[B, 1 or Hkv, n]`; padding leaves as well.
    """
    batch, heads, n = entries.keys.shape[:3]
    apart = any(piece.reduction.keep.shape[0] != len(piece.index) for piece in pieces)
    # One column more takes what invalid slots write.
    stay = torch.ones(batch, heads if apart else 1, n + 1, dtype=torch.bool, device=entries.keys.device)
    if entries.valid is not None:
        stay[..., :n] &= entries.valid[:, None]
    if lost is not None:
        stay[..., :n] &= ~lost[:, None]
    for piece in pieces:
        rows, kept = _kept(piece, stay.shape[1])
        head = torch.arange(stay.shape[1], device=rows.device)[None, :, None]
        stay[rows, head, piece.columns[:, None].expand(-1, stay.shape[1], -1)] = False
        valid = piece.reduction.valid
        if valid is not None:
            kept = torch.where(valid[:, None], kept, n)
        stay[rows, head, kept] = True
    return stay[..., :n]


def _kept(piece: Piece, heads: int) -> tuple[Tensor, Tensor]:
    """Rows `[G, 1, 1]` and columns `[G, heads, K]` of what a piece keeps."""
    keep = piece.reduction.keep.unflatten(0, (len(piece.index), -1))
    columns = piece.columns[:, None].expand(-1, keep.shape[1], -1).gather(2, keep)
    return piece.index[:, None, None], columns.expand(-1, heads, -1)


def evicted(entries: Entries, pieces: Sequence[Piece], stay: Tensor, longest: int) -> Entries:
    """The cache of a layer behind an eviction.

    Args:
        entries: of the layer, as it is.
        pieces: what its methods answered.
        stay: from `staying`.
        longest: entries that stay of the row that keeps most.

    Returns:
        Entries of `longest` columns.
    """
    for piece in pieces:
        entries = _merged(entries, piece)
    n, device = stay.shape[2], stay.device
    order = torch.argsort(stay.to(torch.int8), dim=2, stable=True)[..., n - longest :]
    left = stay.sum(2)[:, 0]
    place = torch.arange(longest, device=device)
    valid = place >= longest - left[:, None]

    def held(table: Tensor) -> Tensor:
        at = order.expand(-1, table.shape[1], -1)
        return table.gather(2, at if table.dim() == 3 else at[..., None].expand(-1, -1, -1, table.shape[3]))

    return Entries(
        held(entries.keys),
        held(entries.values),
        valid,
        None if entries.bias is None else held(entries.bias),
        None if entries.blocks is None else held(entries.blocks[:, None])[:, 0],
    )


def _merged(entries: Entries, piece: Piece) -> Entries:
    """Values of slots that others join, keys where they follow, and what size adds to later logits."""
    reduction = piece.reduction
    if not reduction.merges and reduction.keep_weight is None:
        return entries
    heads, n = entries.keys.shape[1:3]
    apart = reduction.keep.shape[0] != len(piece.index)
    rows, kept = _kept(piece, heads)
    if reduction.valid is not None:
        kept = torch.where(reduction.valid[:, None], kept, n)
    at = rows, torch.arange(heads, device=rows.device)[None, :, None]
    columns = piece.columns[:, None].expand(-1, heads, -1)

    def put(table: Tensor, made: Tensor) -> Tensor:
        """With what was made in its slots; those that are not valid write into a column that is cut off."""
        return F.pad(table, (0, 0) * (table.dim() - 3) + (0, 1)).index_put((at[0], at[1], kept), made.to(table.dtype))[
            :, :, :n
        ]

    tables = [entries.keys, entries.values]
    for i in (0, 1) if piece.weighted else (1,):
        shown = tables[i][at[0], at[1], columns]  # [G, Hkv, N, d]
        merged, _ = reduction.apply(shown.flatten(0, 1) if apart else shown.transpose(1, 2).flatten(2), piece.size)
        made = merged.unflatten(0, (-1, heads)) if apart else merged.unflatten(2, (heads, -1)).transpose(1, 2)
        tables[i] = put(tables[i], made)
    bias = entries.bias
    if piece.proportional:
        joined = reduction.apply(entries.keys.new_zeros(*reduction.keep.shape[:1], piece.columns.shape[1], 1))[1]
        size = joined.unflatten(0, (-1, heads)) if apart else joined[:, None].expand(-1, heads, -1)
        bias = entries.keys.new_zeros(entries.keys.shape[:3], dtype=torch.float32) if bias is None else bias
        bias = put(bias, size.clamp(min=1.0).log())
    return replace(entries, keys=tables[0], values=tables[1], bias=bias)
