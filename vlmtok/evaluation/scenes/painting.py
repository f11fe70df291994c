"""Shapes and digits drawn from lines: what every rendered scene of the package is made of, the same on all machines."""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import ImageDraw

Color = tuple[int, int, int]
_Points = list[tuple[float, float]]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
COLORS: dict[str, Color] = {
    "red": (222, 45, 48),
    "green": (34, 168, 84),
    "blue": (44, 98, 224),
    "yellow": (244, 200, 20),
    "purple": (138, 62, 178),
    "orange": (240, 128, 24),
    "cyan": (32, 190, 204),
    "pink": (250, 122, 178),
}
OVERSAMPLING = 4
"""Pictures are drawn this many times as large and reduced, for smooth edges."""


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, center: tuple[float, float], radius: float, zoom: float, color: Color
) -> None:
    """Draws one of `SHAPES`.

    Args:
        draw: onto this picture.
        shape: which.
        center: column and row, in pixels before zooming.
        radius: of the circle around it, in the same pixels.
        zoom: pixels of `draw` to one of those.
        color: RGB.
    """
    _PAINTERS[shape](draw, center, radius, zoom, color)


def draw_digit(
    draw: ImageDraw.ImageDraw,
    digit: str,
    center: tuple[float, float],
    half: tuple[float, float],
    pen: float,
    zoom: float,
    color: Color,
) -> None:
    """Draws one of `DIGITS` with round strokes.

    Args:
        draw: onto this picture.
        digit: which.
        center: column and row, in pixels before zooming.
        half: half of the width and of the height between the strokes' middles, in the same pixels.
        pen: width of the strokes.
        zoom: pixels of `draw` to one of those.
        color: RGB.
    """
    pen = pen * zoom
    for stroke in _STROKES[digit]:
        points = [((center[0] + half[0] * x) * zoom, (center[1] + half[1] * y) * zoom) for x, y in stroke]
        draw.line(points, fill=color, width=round(pen), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=color)


def _polygon(
    center: tuple[float, float], radius: float, zoom: float, corners: int, radii: tuple[float, ...]
) -> _Points:
    """Corners around the centre, the first straight up, with radii (shares of `radius`) taken in turn."""
    points = []
    for i in range(corners):
        angle = 2 * math.pi * i / corners - math.pi / 2
        r = radius * radii[i % len(radii)]
        points.append(((center[0] + r * math.cos(angle)) * zoom, (center[1] + r * math.sin(angle)) * zoom))
    return points


def _box(
    center: tuple[float, float], radius: float, zoom: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """A box of half-sizes `width` and `height` (shares of `radius`) around the centre."""
    w, h = width * radius, height * radius
    return ((center[0] - w) * zoom, (center[1] - h) * zoom, (center[0] + w) * zoom, (center[1] + h) * zoom)


def _draw_cross(
    draw: ImageDraw.ImageDraw, center: tuple[float, float], radius: float, zoom: float, color: Color
) -> None:
    draw.rectangle(_box(center, radius, zoom, 0.95, 0.34), fill=color)
    draw.rectangle(_box(center, radius, zoom, 0.34, 0.95), fill=color)


_Painter = Callable[[ImageDraw.ImageDraw, tuple[float, float], float, float, Color], None]
_PAINTERS: dict[str, _Painter] = {
    "circle": lambda draw, at, r, zoom, color: draw.ellipse(_box(at, r, zoom, 0.95, 0.95), fill=color),
    "square": lambda draw, at, r, zoom, color: draw.rounded_rectangle(
        _box(at, r, zoom, 0.84, 0.84), radius=0.12 * r * zoom, fill=color
    ),
    "triangle": lambda draw, at, r, zoom, color: draw.polygon(_polygon(at, r, zoom, 3, (1.0,)), fill=color),
    "star": lambda draw, at, r, zoom, color: draw.polygon(_polygon(at, r, zoom, 10, (1.0, 0.42)), fill=color),
    "cross": _draw_cross,
    "ring": lambda draw, at, r, zoom, color: draw.ellipse(
        _box(at, r, zoom, 0.95, 0.95), outline=color, width=round(0.34 * r * zoom)
    ),
}


def _arc(cx: float, cy: float, rx: float, ry: float, start: int, end: int) -> _Points:
    """Points of an elliptic arc; degrees run clockwise from the right, and backwards where `end < start`."""
    step = 10 if end > start else -10
    angles = (math.radians(a) for a in range(start, end + step, step))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


_SIX = _arc(0.1, 0.1, 1.1, 1.1, 300, 180) + _arc(0, 0.42, 1, 0.58, 180, 540)
# Strokes of each digit in a box from (-1, -1), top left, to (1, 1).
_STROKES: dict[str, list[_Points]] = {
    "0": [_arc(0, 0, 1, 1, 0, 360)],
    "1": [[(-0.75, -0.5), (0.1, -1), (0.1, 1)], [(-0.75, 1), (0.95, 1)]],
    "2": [[*_arc(0, -0.42, 1, 0.58, 190, 390), (-1, 1), (1, 1)]],
    "3": [_arc(-0.05, -0.5, 0.9, 0.5, 200, 450) + _arc(0, 0.5, 1, 0.5, 270, 520)],
    "4": [[(0.45, 1), (0.45, -1), (-1, 0.4), (1, 0.4)]],
    "5": [[(0.9, -1), (-0.8, -1), (-0.85, -0.1), *_arc(0, 0.36, 1, 0.64, 230, 500)]],
    "6": [_SIX],
    "7": [[(-1, -1), (1, -1), (-0.3, 1)]],
    "8": [_arc(0, -0.5, 0.82, 0.5, 0, 360), _arc(0, 0.48, 1, 0.52, 0, 360)],
    "9": [[(-x, -y) for x, y in _SIX]],
}
