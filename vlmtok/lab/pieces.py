"""The grids of patches that are drawn on a picture, and where each lies in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.trace import PictureTrace
from ..errors import ParameterError
from .region import Box, region

LITTLE, MARGIN = 0.5, 0.08
"""Share of the picture below which only what the model saw is drawn, with so much of its sides around it."""


@dataclass(frozen=True)
class Piece:
    """A grid of patches and where it lies in the picture.

    Attributes:
        box: its place, in pixels of what is drawn on.
        grid: rows and columns.
        patches: numbers of the patches, row by row.
    """

    box: Box
    grid: tuple[int, int]
    patches: list[int]

    def cell(self, place: int) -> tuple[int, int, int, int]:
        """Pixels of one cell, both ends included; a cell smaller than a pixel has one."""
        row, column = divmod(place, self.grid[1])
        (left, top, _, _), (wide, high) = self.box, self.side
        x, y = round(left + column * wide), round(top + row * high)
        return x, y, max(x, round(left + (column + 1) * wide) - 1), max(y, round(top + (row + 1) * high) - 1)

    def scaled(self, across: float, down: float) -> Piece:
        """The same on a picture that was made larger or smaller."""
        left, top, right, bottom = self.box
        return replace(self, box=(left * across, top * down, right * across, bottom * down))

    def moved(self, left: float, top: float) -> Piece:
        """The same on a part of the picture that begins there."""
        x0, y0, x1, y1 = self.box
        return replace(self, box=(x0 - left, y0 - top, x1 - left, y1 - top))

    @property
    def side(self) -> tuple[float, float]:
        """Width and height of a cell, in pixels."""
        left, top, right, bottom = self.box
        return (right - left) / self.grid[1], (bottom - top) / self.grid[0]


def pieces_of(found: PictureTrace, size: tuple[int, int], preprocess: Any, part: int | None) -> list[Piece]:
    """The grids to draw, each with its place in the picture.

    Args:
        found: of the picture.
        size: its width and height.
        preprocess: as for `vlmtok.lab.region.region`.
        part: one part, or None for all crops where there are any, else the whole picture; of a clip the first frame.

    Raises:
        ParameterError: no such part, or the patches form no grid.
    """
    grids = found.grids()
    if part is not None and part not in grids:
        raise ParameterError(f"part {part} of this picture is no grid; grids: {sorted(grids) or 'none'}")
    if not grids:
        raise ParameterError("the patches of this picture form no single grid; there is nothing to draw them on")
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    crops = sorted(p for p in grids if p > 0)
    canvas = found.canvas
    if part is None and canvas is not None:
        return [Piece(field(size, canvas[0], (0, 0, *canvas[0])), canvas[0], canvas[1].tolist())]
    if part is not None:
        wanted = [part]
    elif found.video:
        wanted = crops[:1]
    else:
        wanted = crops if crops and preprocess is not None else [0]
    pieces = []
    for number in wanted:
        if number not in grids:
            raise ParameterError(f"part {number} of this picture is no grid; grids: {sorted(grids)}")
        grid, patches = grids[number]
        place = found.place(number)
        if canvas is not None and place is not None:
            box = field(size, canvas[0], place)
        elif number == 0 and crops:
            box = whole  # a thumbnail shows all of it
        else:
            box = region(size, preprocess, 0 if found.video else _crop_index(found, number))
        pieces.append(Piece(_visible(box, size), grid, patches.tolist()))
    return pieces


def _visible(box: Box, size: tuple[int, int]) -> Box:
    """The box, or a pixel of the picture where a crop of a thin strip shows less."""
    left, top, right, bottom = box
    if right - left < 1:
        left = min(max(0.0, left), size[0] - 1.0)
        right = left + 1
    if bottom - top < 1:
        top = min(max(0.0, top), size[1] - 1.0)
        bottom = top + 1
    return left, top, right, bottom


def worth_showing(size: tuple[int, int], pieces: Sequence[Piece]) -> tuple[int, int, int, int]:
    """The part of a picture that is worth drawing large: all of it, or what little of it the model saw.

    Args:
        size: of the picture.
        pieces: the grids on it.

    Returns:
        Left, top, right and bottom in pixels of the picture.
    """
    left, top = (max(0.0, min(piece.box[i] for piece in pieces)) for i in (0, 1))
    right, bottom = (min(float(size[i - 2]), max(piece.box[i] for piece in pieces)) for i in (2, 3))
    wide, high = right - left, bottom - top
    if wide <= 0 or high <= 0 or wide * high > LITTLE * size[0] * size[1]:
        return (0, 0, *size)
    x, y = MARGIN * wide, MARGIN * high
    return (
        max(0, math.floor(left - x)),
        max(0, math.floor(top - y)),
        min(size[0], math.ceil(right + x)),
        min(size[1], math.ceil(bottom + y)),
    )


def field(size: tuple[int, int], grid: tuple[int, int], place: tuple[int, int, int, int]) -> Box:
    """Pixels of some rows and columns of a canvas: first row and column, and those behind the last.

    The picture fills the canvas in one direction, and lies in the middle of the other: rows or columns of padding were
    cut off, but not parts of them.
    """
    wide, high = size[0] / grid[1], size[1] / grid[0]
    side = max(wide, high)
    if grid[0] - size[1] / side < 2 and grid[1] - size[0] / side < 2:
        wide = high = side  # else it was stretched
    top, left, bottom, right = place
    x, y = (size[0] - grid[1] * wide) / 2, (size[1] - grid[0] * high) / 2
    return (x + left * wide, y + top * high, x + right * wide, y + bottom * high)


def _crop_index(found: PictureTrace, part: int) -> int:
    """Which of the model's crops shows a part: crops lie in the order of their tokens."""
    if found.parts is None:
        return 0
    order = list(dict.fromkeys(p for p in found.parts.tolist() if p >= 0))
    return order.index(part)
