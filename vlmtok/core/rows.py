"""The rows of a language model during one forward: which columns are pictures, and how a cut moves everything along.

A row holds text and pictures, perhaps padding. Methods see pictures only, one view row per picture, part or sample;
rows with equal counts form one batched view. A cut puts the slots of each picture in its place, drops padding with the
rest, and aligns rows to the right, since hosts read the last column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .reduction import Reduction

TEXT, PAD, HELD = -1, -2, -3
"""Labels of columns that belong to no picture. HELD is read and never cut: a visual token that ends its row, what was
appended, drafts of speculative decoding."""


@dataclass
class Picture:
    """A picture of a row, as host ints.

    Attributes:
        row: its row.
        index: its place among the row's pictures.
        columns: original columns of its tokens.
        runs: where, among these, each of its runs begins.
        video: whether it is a clip.
        grid: rows and columns of patches (of each crop or frame, where these are equally large), or None.
        fields: rows and columns of the parts that differ from `grid`.
        tower: which picture of the tower it is.
        text_after: text columns of the row behind its first token.
        text_after_last: text columns behind its last token.
        n: tokens it has now; None while only the device knows.
        entered: tokens it had when it entered the stage.
        hidden: for each of its tokens, whether the attention mask hides it; empty while none is.
    """

    row: int
    index: int
    columns: list[int]
    runs: list[int] = field(default_factory=lambda: [0])
    video: bool = False
    grid: tuple[int, int] | None = None
    fields: dict[int, tuple[int, int]] = field(default_factory=dict)
    tower: int = 0
    text_after: int = 0
    text_after_last: int = 0
    n: int | None = None
    entered: int = 0
    hidden: list[bool] = field(default_factory=list)

    def show(self) -> None:
        """Lets go of tokens that the mask hides: they are padding, and what is left is no grid."""
        if not any(self.hidden):
            return
        before = [sum(not gone for gone in self.hidden[:start]) for start in self.runs]
        self.columns = [column for column, gone in zip(self.columns, self.hidden) if not gone]
        self.runs = sorted({start for start in before if start < len(self.columns)})
        self.grid, self.fields, self.hidden = None, {}, []


@dataclass(eq=False)
class Group:
    """View rows of equal counts.

    Attributes:
        units: (row, picture or -1, part or -1) of each view row.
        index: int64 `[G]`, LM row of each.
        columns: int64 `[G, N]`, column of each token in the padded row.
        n: N.
        text: T, text columns behind the view's first token.
        length: L, valid columns of the row.
        mixed: whether some of that text stands before some of the view's tokens.
        entered: tokens of a view row when it entered the stage.
        grid: rows and columns of patches of each view row, or None.
    """

    units: list[tuple[int, int, int]]
    index: Tensor
    columns: Tensor
    n: int
    text: int
    length: int
    mixed: bool
    entered: int
    grid: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Moved:
    """What a cut did to columns.

    Attributes:
        place: int64 `[B, L']`, column whose place each new column takes.
        source: int64 `[B, L']`, column whose token it is.
        valid: bool `[B, L']`, or None where no row is padded.
        dropped: int64 `[B]`, valid columns that left each row.
    """

    place: Tensor
    source: Tensor
    valid: Tensor | None
    dropped: Tensor


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Where the columns of some rows stood in the prompt.

    Attributes:
        length: L.
        place: int64 `[B, L]`, original column of each column.
        valid: bool `[B, L]`, or None where no row is padded.
    """

    length: int
    place: Tensor
    valid: Tensor | None

    def restore(self, hidden: Tensor, columns: int) -> Tensor:
        """Puts rows back to their original length; a dropped column repeats the last one kept before it.

        So the prediction of the token behind a picture stays the one that the shortened row makes.

        Args:
            hidden: `[B, L, C]`.
            columns: S, the original length.

        Returns:
            `[B, S, C]`.
        """
        rank = torch.arange(self.length, device=hidden.device).expand_as(self.place)
        target = self.place if self.valid is None else torch.where(self.valid, self.place, columns)
        table = torch.full((self.place.shape[0], columns + 1), -1, device=hidden.device).scatter(1, target, rank)
        latest = table[:, :columns].cummax(1).values
        first = 0 if self.valid is None else self.valid.to(torch.int64).argmax(1, keepdim=True)
        latest = torch.where(latest < 0, first, latest)
        return hidden.gather(1, latest.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


@dataclass(eq=False)
class Rows:
    """The rows as they are now.

    Attributes:
        batch: B.
        length: columns, padding included.
        lengths: valid columns of each row.
        pictures: all pictures, by row.
        label: int64 `[B, L]`, picture of each column, or TEXT, PAD, HELD.
        part: int64 `[B, L]`, or None for all 0.
        valid: bool `[B, L]`, or None where no row is padded.
        place: int64 `[B, L]`, original column of each column.
        positions: int64 `[..., B, L]`, position ids.
        size: fp32 `[B, L]`, or None while all are 1.
        states: `[B, L, ...]` by (method, name).
        known: for which view rows a state was written.
        notes: per (method, scope), name and view row.
        carried: signals on their way, `[B, L, ...]` with the axis that the tokens have in a view, or one entry for
            each picture (axis None).
        first_part: int64 `[B, S]`, `part` as it was at first; kept only for traces.
        owner: int64 `[B, S]`, column that owns each original column (-1 dropped); kept only for traces.
        drafts: last columns that hold drafts of the answer; nobody decides by them.
    """

    batch: int
    length: int
    lengths: list[int]
    pictures: list[Picture]
    label: Tensor
    part: Tensor | None
    valid: Tensor | None
    place: Tensor
    positions: Tensor
    size: Tensor | None = None
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    known: dict[tuple[int, str], set[tuple[int, int, int]]] = field(default_factory=dict)
    notes: dict[tuple[int, str], dict[str, dict[tuple[int, int, int], Any]]] = field(default_factory=dict)
    carried: dict[str, tuple[Tensor, int | None]] = field(default_factory=dict)
    first_part: Tensor | None = None
    owner: Tensor | None = None
    drafts: int = 0

    # ------------------------------------------------------------------ views
    def enter(self, hold: bool = False) -> None:
        """A stage begins: what is here now is what entered.

        Args:
            hold: a visual token that ends its row is held back from now on.
        """
        if hold:
            for picture in self.pictures:
                ends = picture.text_after_last == 0
                last = picture.index == max(p.index for p in self.pictures if p.row == picture.row)
                if ends and last and self.count(picture):
                    end = self.label.new_full((1,), self._last(picture.row))
                    self.label = self.label.index_put((self.label.new_tensor([picture.row]), end), end.new_tensor(HELD))
                    picture.n = self.count(picture) - 1
        for picture in self.pictures:
            picture.entered = self.count(picture)

    def _last(self, row: int) -> int:
        """The last valid column of a row's prompt; rows that were never cut may be padded on the right."""
        if self.valid is None:
            return self.length - 1 - self.drafts
        return int(self.valid[row].nonzero()[-1 - self.drafts])

    def count(self, picture: Picture) -> int:
        """Tokens that a picture has now; asks the device once where the host does not know."""
        if picture.n is None:
            most = max(p.index for p in self.pictures) + 1
            table = torch.stack([(self.label == i).sum(1) for i in range(most)]).tolist()
            for other in self.pictures:
                other.n = int(table[other.index][other.row])
        return 0 if picture.n is None else picture.n

    def groups(self, scope: str, by_text: bool = False, by_length: bool = False) -> list[Group]:
        """The view rows of a scope, grouped by equal counts.

        Args:
            scope: ``picture``, ``part`` or ``sample``.
            by_text: rows of a group have equal T.
            by_length: and equal L.

        Returns:
            Groups in a fixed order; view rows without tokens are left out.
        """
        found: dict[tuple[Any, ...], list[tuple[tuple[int, int, int], list[Picture], int]]] = {}
        for unit, members, n in self._units(scope):
            if n == 0:
                continue
            text = members[0].text_after
            key = (
                n,
                text if by_text else None,
                self.lengths[unit[0]] if by_length else None,
                sum(p.entered for p in members) if unit[2] < 0 else 0,
                _grid(members, n, unit[2]),
            )
            found.setdefault(key, []).append((unit, members, n))
        return [self._group(rows, scope) for rows in found.values()]

    def _units(self, scope: str) -> Iterator[tuple[tuple[int, int, int], list[Picture], int]]:
        if scope == "sample":
            for row in range(self.batch):
                members = [p for p in self.pictures if p.row == row]
                if members:
                    yield (row, -1, -1), members, sum(map(self.count, members))
            return
        for picture in self.pictures:
            if scope == "picture" or self.part is None:
                yield (picture.row, picture.index, -1), [picture], self.count(picture)
                continue
            here = (self.label[picture.row] == picture.index) & (self.part[picture.row] >= 0)
            parts = self.part[picture.row][here].tolist()
            for part in sorted(set(parts)):
                yield (picture.row, picture.index, part), [picture], parts.count(part)

    def _group(self, rows: list[tuple[tuple[int, int, int], list[Picture], int]], scope: str) -> Group:
        device = self.label.device
        units = [unit for unit, _, _ in rows]
        n = rows[0][2]
        index = torch.tensor([unit[0] for unit in units], device=device)
        label = self.label[index]
        if scope == "sample":
            mask = label >= 0
        else:
            mask = label == torch.tensor([unit[1] for unit in units], device=device)[:, None]
            if scope == "part" and self.part is not None:
                mask &= self.part[index] == torch.tensor([unit[2] for unit in units], device=device)[:, None]
        column = torch.arange(self.length, device=device)
        columns = torch.where(mask, column, self.length).sort(1).values[:, :n]
        return Group(
            units,
            index,
            columns,
            n,
            rows[0][1][0].text_after,
            self.lengths[units[0][0]],
            any(members[0].text_after != members[-1].text_after_last for _, members, _ in rows),
            sum(p.entered for p in rows[0][1]) if units[0][2] < 0 else n,
            _grid(rows[0][1], n, units[0][2]),
        )

    def of_pictures(self, group: Group) -> Tensor:
        """Place of each view row's (first) picture among `pictures`, int64 `[G]`."""
        at = [
            next(i for i, p in enumerate(self.pictures) if p.row == row and index in (-1, p.index))
            for row, index, _ in group.units
        ]
        return torch.tensor(at, device=self.label.device)

    def text_columns(self, group: Group) -> Tensor:
        """Columns of the text behind the view's first token, int64 `[G, T]`."""
        label = self.label[group.index]
        column = torch.arange(self.length, device=label.device)
        found = torch.where(label == TEXT, column, -1).sort(1).values
        return found[:, self.length - group.text :]

    def valid_columns(self, group: Group) -> Tensor | None:
        """Columns of the group's rows without padding, int64 `[G, L]`; None where no row is padded."""
        if self.valid is None:
            return None
        column = torch.arange(self.length, device=self.valid.device)
        found = torch.where(self.valid[group.index], column, self.length).sort(1).values
        return found[:, : group.length]

    def relative(self, group: Group, columns: Tensor) -> Tensor:
        """Columns of the padded rows as places in rows without padding."""
        if self.valid is None:
            return columns
        rank = self.valid[group.index].to(torch.int64).cumsum(1) - 1
        return rank.gather(1, columns)

    def gather(self, table: Tensor, group: Group) -> Tensor:
        """`[B, L, ...]` at a group's tokens: `[G, N, ...]`."""
        return table[group.index[:, None], group.columns]

    # ------------------------------------------------------------------ cutting
    def cut(self, x: Tensor, pieces: list[tuple[Group, Reduction]], renumber: bool) -> tuple[Tensor, Moved]:
        """Shortens the rows, the only place that does.

        Args:
            x: `[B, L, C]`.
            pieces: reductions of disjoint groups.
            renumber: position ids of every row that loses tokens here become contiguous; else, and in the other rows,
                each slot keeps that of the token that represents it.

        Returns:
            The shorter rows, right-aligned, and where their columns came from.
        """
        device, batch, length = x.device, self.batch, self.length
        # One column more takes what invalid slots write.
        keep = torch.ones(batch, length + 1, dtype=torch.bool, device=device)
        if self.valid is not None:
            keep[:, :length] = self.valid
        source = torch.arange(length + 1, device=device).expand(batch, length + 1).clone()
        joined = source.clone() if self.owner is not None else None
        size = self.size
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
        before_lengths = self.lengths
        if ragged:
            self.lengths = keep.sum(1).tolist()
        else:
            left = [0] * batch
            for group, reduction in pieces:
                for unit in group.units:
                    left[unit[0]] += group.n - reduction.slots
            self.lengths = [a - b for a, b in zip(before_lengths, left)]
        self._count_pictures(pieces, ragged)
        longest = max(self.lengths)
        place = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, length - longest :]
        valid = None
        if min(self.lengths) != longest:
            first = longest - torch.tensor(self.lengths, device=device)
            valid = torch.arange(longest, device=device) >= first[:, None]
        dropped = torch.tensor([a - b for a, b in zip(before_lengths, self.lengths)], device=device)
        moved = Moved(place, source.gather(1, place), valid, dropped)
        self._move(moved, joined, size, renumber)
        return x.gather(1, moved.source.unsqueeze(-1).expand(-1, -1, x.shape[-1])), moved

    def _count_pictures(self, pieces: list[tuple[Group, Reduction]], ragged: bool) -> None:
        """Keeps the host's counts where they are certain."""
        for group, reduction in pieces:
            for row, index, part in group.units:
                members = [p for p in self.pictures if p.row == row and (index < 0 or p.index == index)]
                certain = len(members) == 1 and part < 0 and reduction.valid is None
                for picture in members:
                    picture.n = reduction.slots if certain else None

    def _move(self, moved: Moved, joined: Tensor | None, size: Tensor | None, renumber: bool) -> None:
        place, source, valid = moved.place, moved.source, moved.valid
        length = self.length
        kept = self.positions.gather(-1, source.expand(*self.positions.shape[:-1], -1))
        if renumber:
            first = self.positions if self.valid is None else torch.where(self.valid, self.positions, 1 << 40)
            base = first.min(-1, keepdim=True).values
            rank = torch.arange(place.shape[1], device=place.device).expand_as(place)
            if valid is not None:
                rank = (valid.to(torch.int64).cumsum(1) - 1).clamp(min=0)
            # What other rows of the batch lose closes no gap here.
            kept = torch.where(moved.dropped[:, None] > 0, base + rank, kept)
        self.positions = kept
        self.label = self.label.gather(1, source)
        if valid is not None:
            self.label = torch.where(valid, self.label, PAD)
        if self.part is not None:
            self.part = self.part.gather(1, source)
        self.place = self.place.gather(1, place)
        self.size = None if size is None else size.gather(1, source)
        for key, table in self.states.items():
            self.states[key] = _follow(table, source)
        for name, (table, axis) in self.carried.items():
            if axis is not None:
                self.carried[name] = (_follow(table, source), axis)
        if self.owner is not None and joined is not None:
            # Where each old column's token is now; column `length` means gone.
            now = torch.full((self.batch, length + 1), -1, device=place.device)
            rank = torch.arange(place.shape[1], device=place.device).expand_as(place)
            now = now.scatter(1, source if valid is None else torch.where(valid, source, length), rank)
            now[:, length] = -1
            target = now.gather(1, joined)
            old = self.owner
            self.owner = torch.where(old >= 0, target.gather(1, old.clamp(min=0)), -1)
        self.valid = valid
        self.length = place.shape[1]

    def append(self, count: int) -> None:
        """Books tokens put at the end of every row; they are read, never cut."""
        batch = self.batch
        self.label = torch.cat([self.label, self.label.new_full((batch, count), HELD)], 1)
        self.place = torch.cat([self.place, self.place.new_full((batch, count), 1 << 40)], 1)
        self.positions = torch.cat([self.positions, self.positions.new_zeros(batch, count)], 1)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(batch, count)], 1)
        if self.size is not None:
            self.size = torch.cat([self.size, self.size.new_ones(batch, count)], 1)
        for key, table in self.states.items():
            self.states[key] = torch.cat([table, table.new_zeros(batch, count, *table.shape[2:])], 1)
        self.lengths = [n + count for n in self.lengths]
        self.length += count

    def discard(self, count: int) -> None:
        """Books that the tokens of the last `append` are gone."""
        end = self.length - count
        self.label, self.place, self.positions = self.label[:, :end], self.place[:, :end], self.positions[:, :end]
        self.valid = None if self.valid is None else self.valid[:, :end]
        self.size = None if self.size is None else self.size[:, :end]
        self.states = {key: table[:, :end] for key, table in self.states.items()}
        self.lengths = [n - count for n in self.lengths]
        self.length = end

    def snapshot(self) -> Snapshot:
        """Where the columns stand now."""
        return Snapshot(self.length, self.place, self.valid)

    def restore(self, hidden: Tensor, columns: int) -> Tensor:
        """`Snapshot.restore` of the rows as they are."""
        return self.snapshot().restore(hidden, columns)


def _grid(members: list[Picture], n: int, part: int) -> tuple[int, int] | None:
    """Rows and columns of a view row's n tokens; None for several pictures, and once some of its tokens are gone."""
    grid = members[0].fields.get(part, members[0].grid) if len(members) == 1 else None
    return grid if grid is not None and grid[0] * grid[1] == n else None


def _real_first(valid: Tensor) -> Tensor:
    """Order that puts valid slots first and leaves their order alone."""
    return torch.argsort((~valid).to(torch.int8), dim=1, stable=True)


def _follow(table: Tensor, source: Tensor) -> Tensor:
    """`[B, L, ...]` gathered along dim 1."""
    index = source.reshape(*source.shape, *[1] * (table.dim() - 2)).expand(-1, -1, *table.shape[2:])
    return table.gather(1, index)
