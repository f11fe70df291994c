"""What the tower learns to say of a page, patch by patch, at every size that a page is shown in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tiny_llava.tower import PATCH

from vlmtok.evaluation.scenes.page import PRINTS, SIZE, THIRD, Mark, Page
from vlmtok.evaluation.scenes.painting import COLORS, DIGITS, SHAPES

GRIDS = (24, 16, 12)
"""Patches a side of the whole page, and of the page shrunk to 128 and to 96 px."""
MARKS = 30
KINDS = (*SHAPES, "plate", "bar", "cell", "swatch")
_COLORS = tuple(COLORS)
_RIM = 4.0  # pixels around a mark where a patch is asked nothing


@dataclass(frozen=True)
class Patches:
    """What each of G x G patches shows.

    Attributes:
        owner: The mark that a patch lies on, or -1, `[G * G]`.
        step: Which digit of that mark it shows, from 1, or 0; 1 also where a bar ends, `[G * G]`.
        center: Whether it is the patch nearest to a mark's centre, `[G * G]`.
        fair: Whether it may be asked: it lies on a mark or clear of all, `[G * G]`.
    """

    owner: np.ndarray
    step: np.ndarray
    center: np.ndarray
    fair: np.ndarray


def read_patches(page: Page, grid: int) -> Patches:
    """What each of `grid` x `grid` patches of a page shows."""
    pitch = SIZE / grid
    axis = (np.arange(grid) + 0.5) * pitch
    xs, ys = (part.ravel() for part in np.meshgrid(axis, axis))
    owner, step = np.full(grid * grid, -1, np.int8), np.zeros(grid * grid, np.int8)
    center, fair = np.zeros(grid * grid, bool), np.ones(grid * grid, bool)
    # Small marks last: where a coarse patch shows two, it shows the small one at least as well.
    for i, mark in sorted(enumerate(page.marks), key=lambda item: -item[1].width * item[1].height):
        nearest = int(np.argmin(np.hypot(xs - mark.x, ys - mark.y)))
        on = _inside(mark, xs, ys, 0.0)
        on[nearest] = True
        fair &= ~_inside(mark, xs, ys, _RIM)
        owner[on], step[on] = i, 0
        center[nearest] = True
        for number, (_, x, y) in enumerate(mark.digits(), 1):
            printed = PRINTS[mark.size]
            half = max(printed.pitch / 2, 0.01)
            touched = on & (abs(xs - x) <= half) & (abs(ys - y) <= printed.half[1] + printed.pen / 2)
            touched[int(np.argmin(np.hypot(xs - x, ys - y)))] = True
            owner[touched], step[touched] = i, number
        if mark.kind == "bar":
            top = mark.y - mark.height / 2
            step[on & (ys <= top + 1.25 * pitch)] = 1
    fair |= owner >= 0
    return Patches(owner, step, center, fair)


def _inside(mark: Mark, xs: np.ndarray, ys: np.ndarray, margin: float) -> np.ndarray:
    if mark.kind in SHAPES:
        return np.hypot(xs - mark.x, ys - mark.y) <= mark.width / 2 + margin
    # Of a cell only its number counts: the rest is background.
    width = PRINTS[mark.size].pitch * len(mark.text) if mark.kind == "cell" else mark.width
    height = 2 * PRINTS[mark.size].half[1] + 2 if mark.kind == "cell" else mark.height
    return (abs(xs - mark.x) <= width / 2 + margin) & (abs(ys - mark.y) <= height / 2 + margin)


ATTRIBUTES = ("kind", "color", "small", "row", "column", "counted", "first", "second", "third")
"""Columns of `read_marks`."""


def read_marks(page: Page) -> np.ndarray:
    """What is known of every mark, `[30, 9]` (see `ATTRIBUTES`): 0 for none, numbers from 1.

    A cell's kind is its row's, as its colour is its column's: "the green column and the ring row" is looked up as "the
    green ring" is. Row and column are those of the nine places, for shapes alone.
    """
    found = np.zeros((MARKS, len(ATTRIBUTES)), np.int8)
    for i, mark in enumerate(page.marks):
        kind = mark.row or mark.kind
        color = 1 + _COLORS.index(mark.color) if mark.color else 0
        place = (1 + int(mark.y // THIRD), 1 + int(mark.x // THIRD)) if mark.is_shape else (0, 0)
        digits = [1 + DIGITS.index(digit) for digit in mark.text]
        found[i] = [1 + KINDS.index(kind), color, mark.small, *place, mark.is_shape, *digits, *[0] * (3 - len(digits))]
    return found


def shown_kinds(page: Page) -> np.ndarray:
    """What CLS must say: which kinds and colours the page shows, and which ninths hold a mark, `[10 + 8 + 9]`."""
    present = np.zeros(len(KINDS) + len(_COLORS) + 9, np.float32)
    for mark in page.marks:
        present[KINDS.index(mark.kind)] = 1
        if mark.color:
            present[len(KINDS) + _COLORS.index(mark.color)] = 1
        present[len(KINDS) + len(_COLORS) + 3 * int(mark.y // THIRD) + int(mark.x // THIRD)] = 1
    return present


assert GRIDS[0] == SIZE // PATCH
