"""Cuts: how the rows of a language model become shorter, and everything that is known of their columns with them."""

from __future__ import annotations

import torch
from torch import Tensor

from .pictures import HELD, PAD
from .reduction import Reduction
from .row_data import ColumnMap, Group, PromptRowData


def cut(
    rows: PromptRowData, x: Tensor, pieces: list[tuple[Group, Reduction]], renumber: bool
) -> tuple[Tensor, ColumnMap]:
    """Applies reductions of view rows to the rows of a prompt, and takes every table along."""
    device, batch, length = x.device, rows.batch, rows.length
    # One column more takes what invalid slots write.
    keep = torch.ones(batch, length + 1, dtype=torch.bool, device=device)
    if rows.valid is not None:
        keep[:, :length] = rows.valid
    source = torch.arange(length + 1, device=device).expand(batch, length + 1).clone()
    joined = source.clone() if rows.owner is not None else None
    size = rows.size
    ragged = False
    for group, reduction in pieces:
        at = group.index[:, None]
        keep[at, group.columns] = False
        kept = group.columns.gather(1, reduction.keep)
        if reduction.merges or reduction.keep_weight is not None:
            tokens = x[at, group.columns]
            before = None if size is None else size[at, group.columns]
            merged, sizes = reduction.apply(tokens, before)
            x = x.index_put((at, kept), merged)
            if size is None:
                size = torch.ones(batch, length, dtype=torch.float32, device=device)
            size = size.index_put((at, kept), sizes)
        if reduction.valid is not None:
            ragged = True
            kept = torch.where(reduction.valid, kept, length)
        keep[at, kept] = True
        # Places ascend; real slots take them in slot order, invalid ones the column that is cut off.
        order = kept if reduction.valid is None else kept.gather(1, _real_first(reduction.valid))
        source[at, kept.sort(1).values] = order
        if joined is not None:
            owner = reduction.assignment(group.n)
            target = kept.gather(1, owner.clamp(min=0)) if reduction.slots else owner
            joined[at, group.columns] = torch.where(owner >= 0, target, length)
    keep, source = keep[:, :length], source[:, :length]
    before_lengths = rows.lengths
    rows.lengths = keep.sum(1).tolist() if ragged else _lengths_after(rows, pieces)
    _count_pictures(rows, pieces)
    longest = max(rows.lengths)
    place = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, length - longest :]
    valid = None
    if min(rows.lengths) != longest:
        first = longest - torch.tensor(rows.lengths, device=device)
        valid = torch.arange(longest, device=device) >= first[:, None]
    dropped = torch.tensor([a - b for a, b in zip(before_lengths, rows.lengths)], device=device)
    moved = ColumnMap(place, source.gather(1, place), valid, dropped)
    _move(rows, moved, joined, size, renumber)
    return x.gather(1, moved.source.unsqueeze(-1).expand(-1, -1, x.shape[-1])), moved


def _lengths_after(rows: PromptRowData, pieces: list[tuple[Group, Reduction]]) -> list[int]:
    """Valid columns of each row behind reductions that are not ragged; the device is not asked."""
    left = [0] * rows.batch
    for group, reduction in pieces:
        for unit in group.units:
            left[unit[0]] += group.n - reduction.slots
    return [a - b for a, b in zip(rows.lengths, left)]


def _count_pictures(rows: PromptRowData, pieces: list[tuple[Group, Reduction]]) -> None:
    """Keeps the host's counts where they are certain."""
    for group, reduction in pieces:
        for row, index, part in group.units:
            members = [p for p in rows.pictures if p.row == row and (index < 0 or p.index == index)]
            certain = len(members) == 1 and part == -1 and reduction.valid is None
            for picture in members:
                picture.n = reduction.slots if certain else None


def _move(rows: PromptRowData, moved: ColumnMap, joined: Tensor | None, size: Tensor | None, renumber: bool) -> None:
    """Takes every table of the rows along."""
    place, source, valid = moved.place, moved.source, moved.valid
    rows.positions = _positions(rows, moved, renumber)
    rows.label = rows.label.gather(1, source)
    if valid is not None:
        rows.label = torch.where(valid, rows.label, PAD)
    if rows.part is not None:
        rows.part = rows.part.gather(1, source)
    rows.place = rows.place.gather(1, place)
    rows.size = None if size is None else size.gather(1, source)
    for key, table in rows.states.items():
        rows.states[key] = _follow(table, source)
    for name, (table, axis) in rows.carried.items():
        if axis is not None:
            rows.carried[name] = (_follow(table, source), axis)
    if rows.owner is not None and joined is not None:
        rows.owner = _owner(rows.owner, moved, joined)
    rows.valid = valid
    rows.length = place.shape[1]


def _positions(rows: PromptRowData, moved: ColumnMap, renumber: bool) -> Tensor:
    """Position ids of the columns that stay."""
    place, source, valid = moved.place, moved.source, moved.valid
    kept = rows.positions.gather(-1, source.expand(*rows.positions.shape[:-1], -1))
    if renumber:
        first = rows.positions if rows.valid is None else torch.where(rows.valid, rows.positions, 1 << 40)
        base = first.min(-1, keepdim=True).values
        rank = torch.arange(place.shape[1], device=place.device).expand_as(place)
        if valid is not None:
            rank = (valid.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        # What other rows of the batch lose closes no gap here.
        return torch.where(moved.dropped[:, None] > 0, base + rank, kept)
    return kept


def _owner(owner: Tensor, moved: ColumnMap, joined: Tensor) -> Tensor:
    """The column that owns each original column now.

    Args:
        owner: int64 `[B, S]`, before the cut.
        moved: what the cut did.
        joined: int64 `[B, L + 1]`, column whose slot each column joined; L means gone.
    """
    place, source, valid = moved.place, moved.source, moved.valid
    length = joined.shape[1] - 1
    now = torch.full((place.shape[0], length + 1), -1, device=place.device)
    rank = torch.arange(place.shape[1], device=place.device).expand_as(place)
    now = now.scatter(1, source if valid is None else torch.where(valid, source, length), rank)
    now[:, length] = -1
    target = now.gather(1, joined)
    return torch.where(owner >= 0, target.gather(1, owner.clamp(min=0)), -1)


def append(rows: PromptRowData, count: int) -> None:
    """Puts columns at the end that no method sees."""
    batch = rows.batch
    rows.label = torch.cat([rows.label, rows.label.new_full((batch, count), HELD)], 1)
    rows.place = torch.cat([rows.place, rows.place.new_full((batch, count), 1 << 40)], 1)
    rows.positions = torch.cat([rows.positions, rows.positions.new_zeros(batch, count)], 1)
    if rows.valid is not None:
        rows.valid = torch.cat([rows.valid, rows.valid.new_ones(batch, count)], 1)
    if rows.size is not None:
        rows.size = torch.cat([rows.size, rows.size.new_ones(batch, count)], 1)
    for key, table in rows.states.items():
        rows.states[key] = torch.cat([table, table.new_zeros(batch, count, *table.shape[2:])], 1)
    rows.lengths = [n + count for n in rows.lengths]
    rows.length += count


def discard(rows: PromptRowData, count: int) -> None:
    """Takes columns off the end."""
    end = rows.length - count
    rows.label, rows.place, rows.positions = rows.label[:, :end], rows.place[:, :end], rows.positions[:, :end]
    rows.valid = None if rows.valid is None else rows.valid[:, :end]
    rows.size = None if rows.size is None else rows.size[:, :end]
    rows.states = {key: table[:, :end] for key, table in rows.states.items()}
    rows.lengths = [n - count for n in rows.lengths]
    rows.length = end


def _real_first(valid: Tensor) -> Tensor:
    """Order that puts valid slots first and leaves their order alone."""
    return torch.argsort((~valid).to(torch.int8), dim=1, stable=True)


def _follow(table: Tensor, source: Tensor) -> Tensor:
    """`[B, L, ...]` gathered along dim 1."""
    index = source.reshape(*source.shape, *[1] * (table.dim() - 2)).expand(-1, -1, *table.shape[2:])
    return table.gather(1, index)
