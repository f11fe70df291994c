"""Pictures that are drawn in code and differ at a glance."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

COLORS = ((200, 30, 30), (30, 60, 200), (20, 150, 60), (220, 160, 20), (140, 40, 160), (20, 160, 170))
GROUNDS = ((240, 236, 226), (28, 30, 38), (206, 222, 240))


def pictures(n: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    """The first `n` of a fixed row of pictures.

    Args:
        n: how many.
        size: width and height in pixels.

    Returns:
        `n` RGB pictures of which no two are alike: each has shapes of its own colour, kind and place.
    """
    return [_draw(i, *size) for i in range(n)]


def _draw(i: int, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), GROUNDS[i % len(GROUNDS)])
    pen = ImageDraw.Draw(image)
    for j in range(3):
        left, top = ((7 * i + 5 * j) % 9) / 12, ((5 * i + 4 * j) % 7) / 10
        box = (width * left, height * top, width * (left + 0.28), height * (top + 0.36))
        draw = (pen.ellipse, pen.rectangle, pen.rounded_rectangle)[(i + j) % 3]
        draw(box, fill=COLORS[(i + 2 * j) % len(COLORS)])
    # Grain, so that no two patches are equal: what a method chooses between equals is decided by rounding.
    grain = Image.frombytes("RGB", image.size, random.Random(i).randbytes(3 * width * height))
    return Image.blend(image, grain, 0.25)
