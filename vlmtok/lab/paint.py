"""What became of each patch, painted on the picture: kept clear, merged tinted and outlined, lost dim.

Of caches, the more layers hold a patch, the brighter it is.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .pieces import Piece
from .states import State, gone_at

EARLY, LATE = 0.35, 0.55
"""Brightness of what was dropped before the language model, and inside it: both can still be made out."""
TINT = 90
"""Of 255, how strongly a merged group is coloured."""
LINES = ((255, 255, 255), (25, 25, 25))
"""Of borders: on what is dark, and on what is bright."""
BRIGHT = 150


@dataclass(frozen=True)
class Fates:
    """What a picture shows at one moment.

    Attributes:
        owner: slot of each patch, -1 where it was dropped.
        sizes: patches of each patch's slot.
        late: for each patch, whether the language model dropped it.
        held: of caches, the share of layers in which each patch is held; else None.
    """

    owner: list[int]
    sizes: list[int]
    late: list[bool]
    held: list[float] | None = None

    @classmethod
    def of(cls, states: Sequence[State], number: int) -> Fates:
        """Reads them off the states of a pass.

        Args:
            states: of `states_of`.
            number: which of them.
        """
        owner = states[number].owner.tolist()
        counts: dict[int, int] = {}
        for slot in owner:
            counts[slot] = counts.get(slot, 0) + 1
        late = []
        for at in gone_at(list(states[: number + 1])):
            site = None if at is None else states[at].site
            late.append(site is not None and site.stage == "decoder")
        state = states[number]
        held = None if state.held is None else (state.held / max(1, state.layers)).tolist()
        return cls(owner, [counts[slot] if slot >= 0 else 0 for slot in owner], late, held)

    def line_between(self, one: int, other: int) -> bool:
        """Whether two neighbours are parted: by the border of a merged group, or of what is left."""
        if self.owner[one] == self.owner[other] and self.held is None:
            return False
        if self.owner[one] != self.owner[other] and max(self.sizes[one], self.sizes[other]) > 1:
            return True
        return self.gone(one) != self.gone(other)

    def gone(self, patch: int) -> bool:
        """Whether nothing of a patch is left; of caches, in no layer."""
        return self.owner[patch] < 0 if self.held is None else self.held[patch] <= 0


def dimmed(image: Image.Image, light: float) -> Image.Image:
    """A picture with little colour and light, in which one still sees what it shows."""
    pale = Image.blend(image, image.convert("L").convert("RGB"), 0.7)
    return pale.point([round(value * light) for value in range(256)] * 3)


def unseen(image: Image.Image) -> Image.Image:
    """A picture as what the model never saw: grey, and lighter than what it dropped."""
    return Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, (160, 160, 160)), 0.6)


def colour(group: int) -> tuple[int, int, int]:
    """A colour of its own for each group: steps of the golden angle around the wheel, pale and full in turns."""
    red, green, blue = colorsys.hsv_to_rgb((group * 0.381966) % 1.0, (0.9, 0.6, 0.75)[group % 3], (1.0, 0.8)[group % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def seen_mask(size: tuple[int, int], pieces: Sequence[Piece]) -> Image.Image:
    """White where the model's input shows the picture, as mode ``L``."""
    seen = Image.new("L", size, 0)
    for piece in pieces:
        left, top, right, bottom = map(round, piece.box)
        ImageDraw.Draw(seen).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=255)
    return seen


def paint(image: Image.Image, pieces: Sequence[Piece], fates: Fates) -> Image.Image:
    """Paints what became of each patch.

    Args:
        image: RGB, as large as the result.
        pieces: the grids, in pixels of it.
        fates: of all patches.
    """
    drawn = Image.composite(image, unseen(image), seen_mask(image.size, pieces))
    early, late = Image.new("L", image.size, 0), Image.new("L", image.size, 0)
    shade = Image.new("RGBA", image.size, (0, 0, 0, 0))
    pens = {True: ImageDraw.Draw(late), False: ImageDraw.Draw(early)}
    tint, light = ImageDraw.Draw(shade), Image.new("L", image.size, 255)
    for piece in pieces:
        for place, patch in enumerate(piece.patches):
            if fates.held is not None:
                ImageDraw.Draw(light).rectangle(piece.cell(place), fill=round(255 * fates.held[patch]))
            elif fates.owner[patch] < 0:
                pens[fates.late[patch]].rectangle(piece.cell(place), fill=255)
            if fates.sizes[patch] > 1:
                tint.rectangle(piece.cell(place), fill=(*colour(fates.owner[patch]), TINT))
    drawn = Image.composite(dimmed(drawn, EARLY), drawn, early)
    drawn = Image.composite(dimmed(drawn, LATE), drawn, late)
    drawn = Image.alpha_composite(drawn.convert("RGBA"), shade).convert("RGB")
    if fates.held is not None:
        drawn = Image.composite(drawn, dimmed(drawn, EARLY), light)
    for piece in pieces:
        _outline(drawn, piece, fates)
    return drawn


def _outline(image: Image.Image, piece: Piece, fates: Fates) -> None:
    """Thin lines along the borders, at the right and lower edge of a cell."""
    pen = ImageDraw.Draw(image)
    rows, columns = piece.grid
    (left, top, _, _), (_, _, right, bottom) = piece.cell(0), piece.cell(rows * columns - 1)
    cells = image.convert("L").crop((left, top, right, bottom))
    bright = list(cells.resize((columns, rows), Image.Resampling.BOX).tobytes())
    for place, patch in enumerate(piece.patches):
        row, column = divmod(place, columns)
        x0, y0, x1, y1 = piece.cell(place)
        line = LINES[bright[place] > BRIGHT]
        if column + 1 < columns and fates.line_between(patch, piece.patches[place + 1]):
            pen.line((x1, y0, x1, y1), fill=line)
        if row + 1 < rows and fates.line_between(patch, piece.patches[place + columns]):
            pen.line((x0, y1, x1, y1), fill=line)


def room_for(size: tuple[int, int], pieces: Sequence[Piece], least: float, most: int) -> tuple[float, float]:
    """How many times larger a picture must be drawn so that each patch can be seen.

    Args:
        size: width and height.
        pieces: the grids on it.
        least: pixels that a patch's sides shall have.
        most: pixels of the longer side up to which both directions grow alike; beyond, the thin one grows alone.

    Returns:
        Factors for width and height, at least 1.
    """
    wide = min(piece.side[0] for piece in pieces)
    high = min(piece.side[1] for piece in pieces)
    both = max(1.0, min(least / min(wide, high), most / max(size)))
    return max(both, least / wide), max(both, least / high)


def enlarged(size: tuple[int, int], pieces: Sequence[Piece], least: float, most: int) -> tuple[int, int]:
    """`room_for` in whole steps, so that pixels stay pixels."""
    across, down = room_for(size, pieces, least, most)
    return math.ceil(across - 1e-9), math.ceil(down - 1e-9)
