"""Pages drawn by lot: scenes of shapes and plates, tables, bar charts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .page import SIZE, SPLITS, THIRD, Layout, Mark, Page, Split
from .painting import COLORS, DIGITS, SHAPES, Color

LAYOUTS: tuple[Layout, ...] = ("scene", "table", "chart")
_CELLS = 4
_CELL = SIZE / _CELLS
_PLATES = {"large": (45.0, 25.0), "fine": (31.0, 14.0)}
_MIDDLE = 4.0  # how far a centre keeps from the lines between the nine places, in pixels


def sample_page(split: Split, layout: Layout, *seed: object) -> Page:
    """Draws the page of a split and a layout that belongs to a seed (any values with a stable `str`).

    Raises:
        ValueError: no such split or layout.
    """
    if split not in SPLITS or layout not in LAYOUTS:
        raise ValueError(f"pages are of a split in {SPLITS} and a layout in {LAYOUTS}; got {split!r}, {layout!r}")
    rng = random.Random(":".join(map(str, (split, layout, *seed))))
    draw = {"scene": _scene, "table": _table, "chart": _chart}[layout]
    while True:
        page = draw(rng)
        if page.split == split:
            return page


def _background(rng: random.Random) -> Color:
    low, high = (226, 255) if rng.random() < 0.5 else (8, 44)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _scene(rng: random.Random) -> Page:
    """Nine to fifteen things in the cells of a 4 x 4 grid: large and small shapes, one or two plates of each print."""
    prints = ["large", "fine", *rng.sample(("large", "fine"), rng.randint(0, 2))]
    small = rng.randint(2, 4)
    large = rng.randint(4, 16 - len(prints) - small - 1)
    looks = _looks(small + large, rng)
    plates = list(zip(rng.sample(list(COLORS), len(prints)), prints))
    cells = rng.sample(range(_CELLS**2), len(looks) + len(plates))
    marks = []
    for i, (kind, color) in enumerate(looks):
        radius = round(rng.uniform(4.2, 5.4) if i < small else rng.uniform(14.0, 19.0), 1)
        x, y = _spot(cells[i], 2 * radius, 2 * radius, rng)
        marks.append(Mark(kind, color, x, y, 2 * radius, 2 * radius, small=i < small))
    for cell, (color, size) in zip(cells[len(looks) :], plates):
        width, height = _PLATES[size]
        x, y = _spot(cell, width, height, rng)
        text = "".join(rng.choice(DIGITS) for _ in range(3))
        marks.append(Mark("plate", color, x, y, width, height, text=text, size=size))
    return Page("scene", _background(rng), tuple(sorted(marks, key=lambda m: (m.y // _CELL, m.x // _CELL))))


def _looks(number: int, rng: random.Random) -> list[tuple[str, str]]:
    """Kind and colour of that many shapes; one kind or one colour stands out by number, so that there is to count."""
    kinds, colors = list(SHAPES), list(COLORS)
    chosen = [(rng.choice(kinds), rng.choice(colors)) for _ in range(number)]
    repeats = rng.randint(2, min(9, number - 1))
    if rng.random() < 0.5:
        theme = rng.choice(kinds)
        others = [kind for kind in kinds if kind != theme]
        chosen = [(theme if i < repeats else rng.choice(others), color) for i, (_, color) in enumerate(chosen)]
    else:
        theme = rng.choice(colors)
        others = [color for color in colors if color != theme]
        chosen = [(kind, theme if i < repeats else rng.choice(others)) for i, (kind, _) in enumerate(chosen)]
    rng.shuffle(chosen)
    return chosen


def _spot(cell: int, width: float, height: float, rng: random.Random) -> tuple[float, float]:
    """A centre inside a cell of the grid, clear of the lines between the nine places."""
    row, column = divmod(cell, _CELLS)
    return _along(column, width, rng), _along(row, height, rng)


def _along(index: int, extent: float, rng: random.Random) -> float:
    room = max(0.0, _CELL / 2 - extent / 2 - 1)
    middle = (index + 0.5) * _CELL
    while True:
        at = round(middle + rng.uniform(-room, room), 1)
        if all(abs(at - line) >= min(_MIDDLE, abs(middle - line)) for line in (THIRD, 2 * THIRD)):
            return at


def _table(rng: random.Random) -> Page:
    """Two-digit numbers in rows headed by shapes and columns headed by colours."""
    rows, columns = rng.randint(3, 5), rng.randint(3, 4)
    width, height = rng.uniform(30, 38), rng.uniform(22, 29)
    left = rng.uniform(4, SIZE - 4 - (columns + 1) * width)
    top = rng.uniform(4, SIZE - 4 - (rows + 1) * height)
    kinds, colors = rng.sample(SHAPES, rows), rng.sample(list(COLORS), columns)
    marks = []
    for c, color in enumerate(colors):
        marks.append(Mark("swatch", color, *_at(left, top, c + 1, 0, width, height), width - 8, height - 9))
    for r, kind in enumerate(kinds):
        marks.append(Mark(kind, "", *_at(left, top, 0, r + 1, width, height), height - 8, height - 8))
        for c, color in enumerate(colors):
            text = rng.choice(DIGITS[1:]) + rng.choice(DIGITS)
            x, y = _at(left, top, c + 1, r + 1, width, height)
            marks.append(Mark("cell", color, x, y, round(width, 1), round(height, 1), text=text, row=kind))
    return Page("table", _background(rng), tuple(marks))


def _at(left: float, top: float, column: int, row: int, width: float, height: float) -> tuple[float, float]:
    return round(left + (column + 0.5) * width, 1), round(top + (row + 0.5) * height, 1)


def _chart(rng: random.Random) -> Page:
    """Four to six bars of different colours on a scale from zero to nine."""
    number = rng.randint(4, 6)
    unit = round(rng.uniform(13.5, 17.5), 1)
    foot = round(rng.uniform(9 * unit + 10, SIZE - 8), 1)
    width = round(rng.uniform(17, 22), 1)
    step = rng.uniform(width + 4, (SIZE - 24) / number)
    left = rng.uniform(12, SIZE - 12 - number * step)
    colors: Sequence[str] = rng.sample(list(COLORS), number)
    marks = []
    for i, color in enumerate(colors):
        value = rng.randint(1, 9)
        x = round(left + (i + 0.5) * step, 1)
        marks.append(
            Mark("bar", color, x, round(foot - value * unit / 2, 2), width, round(value * unit, 2), text=str(value))
        )
    return Page("chart", _background(rng), tuple(marks), unit=unit)
