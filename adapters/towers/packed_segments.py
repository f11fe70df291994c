"""Rows of a packed tower as stretches: windows, frames and pictures, and how long each is now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ...core.row_data import Group
from .packed_grids import PatchGrid


@dataclass(frozen=True)
class Segment:
    """The finest stretch of a row within which tokens may merge: a window, or a frame.

    Attributes:
        frame: number of its frame among those of the call.
        picture: number of its picture or clip.
        entered: patches that it had.
        n: tokens that it has.
        grid: rows and columns of its patches where they lie row by row, or None.
        start: its first place in a row that is padded, where the host pads.
    """

    frame: int
    picture: int
    entered: int
    n: int
    grid: tuple[int, int] | None = None
    start: int | None = None


@dataclass(frozen=True)
class Segments:
    """All segments of a row, in order.

    Attributes:
        items: the segments.
        total: places of the row.
    """

    items: tuple[Segment, ...]
    total: int

    @classmethod
    def of_grids(cls, grids: Sequence[PatchGrid], raster: bool, padded: int | None = None) -> Segments:
        """Frames of pictures.

        Args:
            grids: of the pictures.
            raster: whether patches lie row by row.
            padded: places of a picture's row where each picture has one, or None where all lie in one.
        """
        found: list[Segment] = []
        frame = 0
        for picture, (frames, rows, columns) in enumerate(grids):
            for inside in range(frames):
                n = rows * columns
                start = None if padded is None else picture * padded + inside * n
                found.append(Segment(frame, picture, n, n, (rows, columns) if raster else None, start))
                frame += 1
        total = sum(segment.n for segment in found) if padded is None else len(grids) * padded
        return cls(tuple(found), total)

    def windowed(self, bounds: Sequence[int]) -> Segments:
        """The same row in windows.

        Args:
            bounds: places at which windows begin, and the end; those of frames are among them.
        """
        ends = list(accumulate(segment.n for segment in self.items))
        found, at = [], 0
        for begin, end in pairwise(bounds):
            while begin >= ends[at]:
                at += 1
            found.append(replace(self.items[at], entered=end - begin, n=end - begin, grid=None))
        return Segments(tuple(found), self.total)

    def shortened(self, lengths: Sequence[int]) -> Segments:
        """The same segments with so many tokens each."""
        items = tuple(replace(segment, n=n) for segment, n in zip(self.items, lengths))
        return Segments(items, sum(lengths))

    @property
    def starts(self) -> list[int]:
        """First place of each segment."""
        if any(segment.start is not None for segment in self.items):
            return [segment.start or 0 for segment in self.items]
        return [0, *accumulate(segment.n for segment in self.items)][:-1]

    def places(self, device: torch.device) -> list[Tensor]:
        """Places of the tokens of each segment, int64 `[n]` each.

        Args:
            device: of them.
        """
        return [
            torch.arange(start, start + segment.n, device=device) for start, segment in zip(self.starts, self.items)
        ]

    def runs(self, span: str) -> list[list[int]]:
        """Which segments see each other.

        Args:
            span: ``window``, ``frame`` or ``row`` (their picture).
        """
        if span == "window":
            return [[i] for i in range(len(self.items))]
        found: dict[int, list[int]] = {}
        for i, segment in enumerate(self.items):
            found.setdefault(segment.frame if span == "frame" else segment.picture, []).append(i)
        return list(found.values())

    def bounds(self, span: str) -> list[int]:
        """Boundaries of the stretches that see each other, and the end."""
        starts = self.starts
        return [*(starts[run[0]] for run in self.runs(span)), self.total]

    def groups(self, span: str, device: torch.device) -> list[Group]:
        """Stretches of equal length that see each other, as rows of a view.

        Args:
            span: as of `runs`.
            device: of the columns.
        """
        starts, length = self.starts, self.total
        alike: dict[tuple[int, int, tuple[int, int] | None], list[int]] = {}
        sizes: dict[int, int] = {}
        for unit, run in enumerate(self.runs(span)):
            parts = [self.items[i] for i in run]
            n, entered = sum(part.n for part in parts), sum(part.entered for part in parts)
            grid = parts[0].grid if len(parts) == 1 and n == entered else None
            alike.setdefault((n, entered, grid), []).append(unit)
            sizes[unit] = starts[run[0]]
        found = []
        for (n, entered, grid), units in alike.items():
            first = torch.tensor([sizes[unit] for unit in units], device=device)
            columns = first[:, None] + torch.arange(n, device=device)
            index = torch.zeros(len(units), dtype=torch.int64, device=device)
            found.append(Group([(0, unit, -1) for unit in units], index, columns, n, 0, length, False, entered, grid))
        return found

    def frame_lengths(self) -> list[int]:
        """Tokens of the frame of each segment."""
        sums: dict[int, int] = {}
        for segment in self.items:
            sums[segment.frame] = sums.get(segment.frame, 0) + segment.n
        return [sums[segment.frame] for segment in self.items]
