"""Entries of a key-value cache leave: what a layer holds behind the reductions of its views.

Kept entries keep their order and the positions by which their keys were turned. Rows are aligned to the right, so that
the last columns of all layers are the same tokens; what stands in front of a shorter row is marked as no entry. Where
each key-value head loses entries of its own, every head is a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .reduction import Reduction


def heads_as_rows(table: Tensor) -> Tensor:
    """Every head as a row: `[B, H, n, ...]` as `[B H, 1, n, ...]`."""
    return table.flatten(0, 1).unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Piece:
    """What leaves of some view rows.

    Attributes:
        index: int64 `[G]`, row of each.
        columns: int64 `[G, N]`, where their entries stand in the cache, padding included.
        reduction: of `[G, N]`.
        size: fp32 `[G, N]`, patches that each stands for, by which means are weighted; or None for ones.
        weighted: whether keys merge as values do.
        proportional: whether merged entries get log(size) in later attention.
    """

    index: Tensor
    columns: Tensor
    reduction: Reduction
    size: Tensor | None = None
    weighted: bool = False
    proportional: bool = False

    def kept(self, beyond: int) -> Tensor:
        """Columns of its slots, int64 `[G, K]`; `beyond` for those that are not valid."""
        kept = self.columns.gather(1, self.reduction.keep)
        return kept if self.reduction.valid is None else torch.where(self.reduction.valid, kept, beyond)


@dataclass(frozen=True, eq=False)
class Entries:
    """What one layer's cache holds; rows are those of the batch, or their heads.

    Attributes:
        keys: `[B, H, n, d]`.
        values: `[B, H, n, d]`.
        valid: bool `[B, n]`, or None while all are real.
        bias: fp32 `[B, H, n]`, log of the sizes of merged entries, or None while nothing is merged so.
        blocks: int64 `[B, n]`, bidirectional block of each, or None.
        tables: what else is known of each, `[B, n, ...]`, by name.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
    bias: Tensor | None = None
    blocks: Tensor | None = None
    tables: dict[str, Tensor] = field(default_factory=dict)

    def by_head(self) -> Entries:
        """The same with every head as a row, `[B H, 1, n, d]`."""
        heads = self.keys.shape[1]

        def each(table: Tensor | None) -> Tensor | None:
            return None if table is None else table.repeat_interleave(heads, 0)

        bias = None if self.bias is None else heads_as_rows(self.bias)
        keys, values = heads_as_rows(self.keys), heads_as_rows(self.values)
        return Entries(keys, values, each(self.valid), bias, each(self.blocks), self.tables)

    def joined(self, heads: int) -> Entries:
        """The inverse of `by_head`, of rows whose heads hold equally many entries."""

        def whole(table: Tensor) -> Tensor:
            return table.squeeze(1).unflatten(0, (-1, heads))

        def first(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[::heads]

        bias = None if self.bias is None else whole(self.bias)
        return Entries(whole(self.keys), whole(self.values), first(self.valid), bias, first(self.blocks), self.tables)


def staying(entries: Entries, pieces: Sequence[Piece], lost: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which entries stay.

    Args:
        entries: of the layer.
        pieces: what its methods answered; they do not overlap.
        lost: bool `[B, n]`, entries that leave besides, or None.

    Returns:
        bool `[B, n]`, padding left out; and the same in front of the pieces.
    """
    batch, _, n = entries.keys.shape[:3]
    before = torch.ones(batch, n, dtype=torch.bool, device=entries.keys.device)
    before = before if entries.valid is None else before & entries.valid
    before = before if lost is None else before & ~lost
    stay = F.pad(before, (0, 1))  # one column more takes what invalid slots write
    for piece in pieces:
        rows = piece.index[:, None]
        stay = stay.index_put((rows, piece.columns), stay.new_zeros(()))
        stay = stay.index_put((rows, piece.kept(n)), stay.new_ones(()))
    return stay[:, :n], before


def evicted(entries: Entries, pieces: Sequence[Piece], stay: Tensor, longest: int) -> Entries:
    """The cache of a layer behind an eviction.

    Args:
        entries: of the layer, as it is.
        pieces: what its methods answered.
        stay: bool `[B, n]`, from `staying`.
        longest: entries that stay of the row that keeps most.

    Returns:
        Entries of `longest` columns.
    """
    for piece in pieces:
        entries = _merged(entries, piece)
    n = stay.shape[1]
    order = torch.argsort(stay.to(torch.int8), dim=1, stable=True)[:, n - longest :]
    valid = torch.arange(longest, device=stay.device) >= longest - stay.sum(1, keepdim=True)

    def held(table: Tensor, axis: int) -> Tensor:
        shape = [len(order), *[1] * (table.dim() - 1)]
        shape[axis] = longest
        wide = [*table.shape[:axis], longest, *table.shape[axis + 1 :]]
        return table.gather(axis, order.reshape(shape).expand(wide))

    return Entries(
        held(entries.keys, 2),
        held(entries.values, 2),
        valid,
        None if entries.bias is None else held(entries.bias, 2),
        None if entries.blocks is None else held(entries.blocks, 1),
        {name: held(table, 1) for name, table in entries.tables.items()},
    )


def _merged(entries: Entries, piece: Piece) -> Entries:
    """Values of slots that others join, keys where they follow, and what size adds to later logits."""
    reduction = piece.reduction
    if not reduction.merges and reduction.keep_weight is None:
        return entries
    heads, n = entries.keys.shape[1:3]
    rows, head = piece.index[:, None, None], torch.arange(heads, device=piece.index.device)[None, :, None]
    kept = piece.kept(n)[:, None]

    def put(table: Tensor, made: Tensor) -> Tensor:
        """With what was made in its slots; those that are not valid write into a column that is cut off."""
        room = F.pad(table, (0, 0) * (table.dim() - 3) + (0, 1))
        return room.index_put((rows, head, kept), made.to(table.dtype))[:, :, :n]

    tables = [entries.keys, entries.values]
    for i in (0, 1) if piece.weighted else (1,):
        shown = tables[i][rows, head, piece.columns[:, None]]  # [G, H, N, d]
        merged, _ = reduction.apply(shown.transpose(1, 2).flatten(2), piece.size)
        tables[i] = put(tables[i], merged.unflatten(2, (heads, -1)).transpose(1, 2))
    bias = entries.bias
    if piece.proportional:
        count = reduction.apply(entries.keys.new_zeros(*piece.columns.shape, 1))[1]
        bias = entries.keys.new_zeros(entries.keys.shape[:3], dtype=torch.float32) if bias is None else bias
        bias = put(bias, count.clamp(min=1.0).log()[:, None].expand(-1, heads, -1))
    return replace(entries, keys=tables[0], values=tables[1], bias=bias)
