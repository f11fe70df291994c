"""Rows of a prompt as host ints: which view rows a cut sees, and what it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace

from ..core.ledger import Group
from ..core.sight import Grid, Seen


@dataclass(frozen=True)
class Prompt:
    """What goes into a model.

    Attributes:
        batch: rows of the batch, all alike.
        pictures: pictures of a row; a lone tower sees as many rows as there are pictures.
        text: text tokens before the first picture, between pictures, and behind the last one.
        visual: visual tokens of a picture in the language model.
        parts: how many of them each part of a picture has; empty where it is one.
        crops: rows of the tower for one picture.
        patches: patches of a row of the tower.
        words: tokens of a row of the text tower.
        every: whether the head sees all tokens of a prompt (a plain forward) or the last one (`generate`).
        grids: frames, rows and columns of patches of each picture of a row, for towers that take pictures of any size;
            empty means as near to a square as `visual` allows.
        seen: the pictures of a row, where a processor told; `visual`, `parts` and `crops` do not count then, and
            `pictures` is how many these are.
        seen_rows: rows of the tower for all of them.
        frames: of each picture, where they are clips; 0 where they are none.
    """

    batch: int = 1
    pictures: int = 1
    text: tuple[int, ...] = (0, 64)
    visual: int = 0
    parts: tuple[int, ...] = ()
    crops: int = 1
    patches: int = 0
    words: int = 0
    every: bool = False
    grids: tuple[tuple[int, int, int], ...] = ()
    seen: tuple[Seen, ...] = ()
    seen_rows: int = 0
    frames: int = 0

    @property
    def shown(self) -> tuple[Seen, ...]:
        """The pictures of a row."""
        cells = self.visual // self.frames if self.frames else 0
        told = Seen(self.visual, self.parts, frames=self.frames, cells=cells)
        return self.seen or (told,) * self.pictures

    @property
    def rows(self) -> int:
        """Rows of the tower for the pictures of a row."""
        return self.seen_rows if self.seen else self.pictures * self.crops


@dataclass
class Shown:
    """A picture of the row; of its tokens, `apart` belong to no part. `grids` are those with which its parts came."""

    parts: list[int]
    after: int
    after_last: int
    entered: int = 0
    apart: int = 0
    grids: tuple[Grid | None, ...] = ()
    frames: int = 0
    cells: int = 0

    @property
    def n(self) -> int:
        """Tokens it has now."""
        return sum(self.parts) + self.apart

    def grid(self, part: int) -> Grid | None:
        """Rows and columns of a part, or of all tokens for -1, as they entered; None where they are not known."""
        if part < 0:
            return self.grids[0] if len(self.grids) == 1 and not self.apart else None
        return self.grids[part]

    def leave(self, count: int, of_parts: bool = False) -> None:
        """So many tokens are left (of those in parts); how they fall into parts is not known, evenly is assumed."""
        if of_parts:
            self.parts = share(count, self.parts)
        else:
            *self.parts, self.apart = share(count, [*self.parts, self.apart])


def share(count: int, among: list[int]) -> list[int]:
    """Splits a count in proportion to some numbers, as evenly as whole numbers can be."""
    total, seen, given, parts = sum(among), 0, 0, []
    for part in among:
        seen += part
        now = count * seen // total if total else 0
        parts.append(now - given)
        given = now
    return parts


@dataclass(eq=False)
class PlannedGroup:
    """View rows of equal counts, in one row of the batch.

    Attributes:
        units: (picture or -1, part or -1) of each.
        n: tokens of each.
        entered: when they entered the stage.
        text: text tokens behind their first token.
        length: tokens of the row.
        mixed: whether some of that text stands before some of their tokens.
        grid: rows and columns of their tokens as they came, or None.
        frames: frames of the clip that each is; 0 where it is none.
        cells: tokens of each frame while they are whole; else 0.
    """

    units: list[tuple[int, int]]
    n: int
    entered: int
    text: int
    length: int
    mixed: bool
    grid: Grid | None = None
    frames: int = 0
    cells: int = 0

    def counted(self, batch: int) -> Group:
        """As the ledger books it, nothing dropped."""
        of = (self.entered, self.text, self.length, self.mixed, self.frames, self.cells)
        return Group(batch * len(self.units), self.n, self.n, *of)


class PlannedRows:
    """One row of a language model's batch, as counts; all rows are alike (see `core.rows` for the real ones).

    Args:
        prompt: what goes in.
        grid: rows and columns of the tower's patches: those of as many tokens, where nobody told others.
    """

    def __init__(self, prompt: Prompt, grid: Grid | None = None) -> None:
        shown = prompt.shown
        self.pictures = []
        for index, picture in enumerate(shown):
            last = sum(prompt.text[index + 1 :]) + sum(later.inside for later in shown[index + 1 :])
            parts = picture.parts or (picture.tokens - picture.apart,)
            grids = picture.grids or tuple(grid if grid and grid[0] * grid[1] == n else None for n in parts)
            at = (list(parts), picture.inside + last, last, 0, picture.apart, grids)
            self.pictures.append(Shown(*at, frames=picture.frames, cells=picture.cells))
        self.single = not any(picture.parts for picture in shown)
        self.length = sum(prompt.text) + sum(picture.inside + picture.tokens for picture in shown)

    def copy(self) -> PlannedRows:
        """The same counts, on their own."""
        made = copy(self)
        made.pictures = [replace(picture, parts=list(picture.parts)) for picture in self.pictures]
        return made

    def lose(self, before: PlannedRows, after: PlannedRows) -> None:
        """As many tokens of each part leave as a cut took from the same rows in a later layer."""
        for mine, old, new in zip(self.pictures, before.pictures, after.pictures):
            mine.parts = [n - (was - now) for n, was, now in zip(mine.parts, old.parts, new.parts)]
            mine.apart -= old.apart - new.apart
        self.length -= before.length - after.length

    def enter(self, hold: bool = False) -> None:
        """A stage begins; a visual token that ends the row is held back in the decoder."""
        if hold and self.pictures and self.pictures[-1].after_last == 0 and self.pictures[-1].n:
            ends = self.pictures[-1]
            if ends.apart:  # a separator stands behind every row
                ends.apart -= 1
            else:
                ends.parts[max(i for i, n in enumerate(ends.parts) if n)] -= 1
        for picture in self.pictures:
            picture.entered = picture.n

    def groups(self, scope: str, by_text: bool = False, by_length: bool = False) -> list[PlannedGroup]:
        """The view rows of a scope, grouped by equal counts."""
        found: dict[tuple[object, ...], PlannedGroup] = {}
        for unit, members, n, entered in self._units(scope):
            if not n:
                continue
            first, last = members[0], members[-1]
            grid = first.grid(unit[1]) if len(members) == 1 else None
            clip = _frames(members, n, unit)
            key = (n, first.after if by_text else None, entered if unit[1] < 0 else 0, grid, clip)
            mixed = first.after != last.after_last
            if key in found:
                found[key].units.append(unit)
                found[key].mixed = found[key].mixed or mixed
            else:
                found[key] = PlannedGroup([unit], n, entered, first.after, self.length, mixed, grid, *clip)
        return list(found.values())

    def _units(self, scope: str) -> Iterable[tuple[tuple[int, int], list[Shown], int, int]]:
        if scope == "sample":
            if self.pictures:
                total, entered = sum(p.n for p in self.pictures), sum(p.entered for p in self.pictures)
                yield (-1, -1), self.pictures, total, entered
            return
        for index, picture in enumerate(self.pictures):
            if scope in ("picture", "head") or self.single:
                yield (index, -1), [picture], picture.n, picture.entered
                continue
            if scope == "clip" or (scope == "frame" and not picture.frames):
                yield (index, -1), [picture], sum(picture.parts), picture.entered
                continue
            for part, n in enumerate(picture.parts):
                yield (index, part), [picture], n, n

    def cut(self, groups: Iterable[tuple[PlannedGroup, int]]) -> None:
        """So many slots are left of each view row."""
        for group, slots in groups:
            for picture, part in group.units:
                self.length -= group.n - slots
                if picture < 0:
                    counts = share(slots, [shown.n for shown in self.pictures])
                    for shown, count in zip(self.pictures, counts):
                        shown.leave(count)
                elif part < 0:
                    self.pictures[picture].leave(slots, of_parts=group.n < self.pictures[picture].n)
                else:
                    self.pictures[picture].parts[part] = slots

    def drop_separators(self, groups: Iterable[PlannedGroup], batch: int) -> tuple[Group, ...]:
        """What stands between rows of patches leaves with the pictures of some view rows; as the ledger books it."""
        units = [picture for group in groups for picture, _ in group.units]
        which = range(len(self.pictures)) if -1 in units else sorted(set(units))
        gone = [self.pictures[index] for index in which if self.pictures[index].apart]
        for picture in gone:
            self.length -= picture.apart
        alike = Counter(picture.apart for picture in gone)
        for picture in gone:
            picture.apart = 0
        return tuple(Group(batch * times, n, 0, n) for n, times in alike.items())


def _frames(members: list[Shown], n: int, unit: tuple[int, int]) -> tuple[int, int]:
    """Frames and their tokens, as `core.grouping` finds them in the real rows."""
    index, part = unit
    first = members[0]
    if part >= 0:
        return 0, 0
    if index >= 0 or (len(members) == 1 and first.frames):
        return first.frames, first.cells if n == first.frames * first.cells else 0
    if any(p.frames or p.grids != first.grids or p.entered != first.entered for p in members):
        return 0, 0
    return len(members), first.entered if n == len(members) * first.entered else 0
