"""Pictures for requests: as ``data:`` URLs, and drawn in any number, each different from all others."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("crimson", "seagreen", "royalblue", "gold", "purple", "darkorange", "turquoise", "hotpink")


def data_url(picture: Image.Image) -> str:
    """A picture as the text that requests carry."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def file_url(path: Path) -> str:
    """A picture of the disk as the text that requests carry."""
    with Image.open(path) as picture:
        return data_url(picture.convert("RGB"))


def draw(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coloured shapes on a plain ground; another seed, another picture.

    Args:
        seed: from 0 to 2**24 - 1; the ground's colour spells it, so that no two seeds give one picture.
        size: width and height in pixels, at least 8.
    """
    ground = seed.to_bytes(3, "big")
    width, height = size
    picture = Image.new("RGB", size, tuple(ground))
    pen, rng = ImageDraw.Draw(picture), random.Random(seed)
    for cell in rng.sample(range(9), rng.randint(4, 7)):
        row, column = divmod(cell, 3)
        left, top = (column + rng.uniform(0.05, 0.3)) * width / 3, (row + rng.uniform(0.05, 0.3)) * height / 3
        right, bottom = left + 0.6 * width / 3, top + 0.6 * height / 3
        color, shape = rng.choice(COLORS), rng.choice(("ellipse", "square", "triangle"))
        if shape == "ellipse":
            pen.ellipse((left, top, right, bottom), fill=color)
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill=color)
        else:
            pen.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=color)
    return picture


def fresh(size: tuple[int, int], start: int = 0) -> Iterator[str]:
    """Drawn pictures as ``data:`` URLs without end, none twice."""
    seed = start
    while True:
        # A step that is odd meets every colour before one comes again, and neighbours look unlike.
        yield data_url(draw(seed * 7_368_787 % 2**24, size))
        seed += 1
