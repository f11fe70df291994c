"""A page of the rendered world: what stands where on 192 x 192 pixels, and how it is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from PIL import Image, ImageDraw

from .painting import COLORS, OVERSAMPLING, SHAPES, Color, draw_digit, draw_shape

SIZE = 192
"""Width and height of a page in pixels."""
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
THIRD = SIZE / 3

Layout = Literal["scene", "table", "chart"]
Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
HELD_OUT_SHARE = 16
"""One arrangement in this many is held out."""

_DARK, _LIGHT = (16, 16, 20), (250, 250, 250)
_PALE = {"yellow", "cyan", "pink", "orange"}


@dataclass(frozen=True)
class Print:
    """How large digits are printed, in pixels: half of a digit's width and height, the pen, from digit to digit."""

    half: tuple[float, float]
    pen: float
    pitch: float


PRINTS = {
    "large": Print((4.0, 7.6), 2.9, 13.5),
    "medium": Print((2.7, 4.8), 1.9, 9.5),
    "fine": Print((2.1, 3.4), 1.4, 8.0),
}


@dataclass(frozen=True)
class Mark:
    """One thing on a page.

    Attributes:
        kind: One of `SHAPES`, ``"plate"``, ``"bar"``, ``"cell"`` (of a table) or ``"swatch"`` (the head of a column).
        color: One of `COLORS`: its own or, for a cell, its column's; "" for the grey shape at the head of a row.
        x: Column of its centre in pixels.
        y: Row of its centre.
        width: In pixels.
        height: In pixels.
        small: Whether it is a small shape.
        text: The digits on it; for a bar, its value, which is not printed.
        size: Of the print, one of `PRINTS`.
        row: For a cell, the shape at the head of its row.
    """

    kind: str
    color: str
    x: float
    y: float
    width: float
    height: float
    small: bool = False
    text: str = ""
    size: str = "medium"
    row: str = ""

    @property
    def is_shape(self) -> bool:
        """Whether it is one of the shapes that are counted: those of a scene, not a row's head."""
        return self.kind in SHAPES and bool(self.color)

    @property
    def place(self) -> str:
        """Which ninth of the page holds its centre: "top left" to "bottom right"."""
        return f"{ROWS[int(self.y // THIRD)]} {COLUMNS[int(self.x // THIRD)]}"

    def digits(self) -> Iterator[tuple[str, float, float]]:
        """Every printed digit with the column and row of its centre."""
        if self.kind == "bar":
            return
        pitch = PRINTS[self.size].pitch
        for i, digit in enumerate(self.text):
            yield digit, self.x + (i - (len(self.text) - 1) / 2) * pitch, self.y


@dataclass(frozen=True)
class Page:
    """A picture before it is drawn.

    Attributes:
        layout: What kind of page it is.
        background: RGB.
        marks: What stands on it.
        unit: For a chart, the pixels of one step of its scale; its zero line is the bars' foot.
    """

    layout: Layout
    background: Color
    marks: tuple[Mark, ...]
    unit: float = 0.0

    @cached_property
    def arrangement(self) -> str:
        """Canonical JSON of what is shown together, without positions to the pixel, sizes and background."""
        rows = [[m.kind, m.color, m.small, m.text, m.size, m.row, m.place] for m in self.marks]
        return json.dumps([self.layout, *rows], separators=(",", ":"))

    @cached_property
    def split(self) -> Split:
        """The split that this arrangement belongs to, by its hash."""
        digest = hashlib.sha256(self.arrangement.encode()).hexdigest()
        return "held-out" if int(digest[:8], 16) % HELD_OUT_SHARE == 0 else "train"

    @property
    def dark(self) -> bool:
        """Whether the background is dark."""
        return sum(self.background) < 384

    def draw(self) -> Image.Image:
        """Draws it as an RGB picture of 192 x 192 pixels, with smooth edges."""
        zoom = OVERSAMPLING
        picture = Image.new("RGB", (SIZE * zoom, SIZE * zoom), self.background)
        draw = ImageDraw.Draw(picture)
        if self.layout == "chart":
            self._draw_scale(draw, zoom)
        if self.layout == "table":
            self._draw_rules(draw, zoom)
        for mark in self.marks:
            self._draw_mark(draw, mark, zoom)
        return picture.reduce(OVERSAMPLING)

    def _draw_mark(self, draw: ImageDraw.ImageDraw, mark: Mark, zoom: int) -> None:
        left, top = (mark.x - mark.width / 2) * zoom, (mark.y - mark.height / 2) * zoom
        right, bottom = (mark.x + mark.width / 2) * zoom, (mark.y + mark.height / 2) * zoom
        ink = _LIGHT if self.dark else _DARK
        if mark.kind in SHAPES:
            color = COLORS[mark.color] if mark.color else self._grey
            draw_shape(draw, mark.kind, (mark.x, mark.y), mark.width / 2, zoom, color)
        elif mark.kind != "cell":
            draw.rounded_rectangle((left, top, right, bottom), radius=1.5 * zoom, fill=COLORS[mark.color])
            ink = _DARK if mark.color in _PALE else _LIGHT
        printed = PRINTS[mark.size]
        for digit, x, y in mark.digits():
            draw_digit(draw, digit, (x, y), printed.half, printed.pen, zoom, ink)

    @property
    def _grey(self) -> Color:
        return (176, 176, 180) if self.dark else (96, 96, 100)

    def _draw_scale(self, draw: ImageDraw.ImageDraw, zoom: int) -> None:
        """Lines at every step of the scale, a stronger one at zero and at five."""
        foot = max(mark.y + mark.height / 2 for mark in self.marks)
        faint = (70, 70, 76) if self.dark else (200, 200, 204)
        for step in range(10):
            y = (foot - step * self.unit) * zoom
            strong = step in (0, 5)
            draw.line((8 * zoom, y, (SIZE - 8) * zoom, y), fill=self._grey if strong else faint, width=zoom)

    def _draw_rules(self, draw: ImageDraw.ImageDraw, zoom: int) -> None:
        """Thin lines between the rows of a table."""
        cells = [mark for mark in self.marks if mark.kind == "cell"]
        faint = (80, 80, 86) if self.dark else (190, 190, 194)
        left = (min(m.x - m.width / 2 for m in self.marks)) * zoom
        right = (max(m.x + m.width / 2 for m in self.marks)) * zoom
        for y in sorted({m.y - m.height / 2 for m in cells}):
            draw.line((left, y * zoom, right, y * zoom), fill=faint, width=zoom)
