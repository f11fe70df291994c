"""Captioned pictures: one to four things on 128 x 128 pixels, what is behind them, and sentences that hold."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from PIL import Image, ImageDraw

from .page import COLUMNS, HELD_OUT_SHARE, ROWS, SPLITS, Split
from .painting import COLORS, OVERSAMPLING, SHAPES, Color, draw_shape

SIDE = 128
"""Width and height of a picture in pixels."""
CLASSES = tuple((color, shape) for color in COLORS for shape in SHAPES)
"""What a picture's single thing may be."""
TEMPLATE = "a picture of a {} {}"
"""The sentence of a class, from colour and shape."""
RELATIONS = ("above", "below", "left of", "right of")
_INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

Backing = Literal["plain", "gradient", "clutter"]
BACKINGS: tuple[Backing, ...] = ("plain", "gradient", "clutter")
_GRID, _PATCH = 4, 8
_CELL = SIDE // _GRID
_JITTER = 2.0  # of a thing's centre in its cell, in pixels: things never touch
_RADII = {True: (5.0, 7.0), False: (12.0, 13.5)}
_THIRD = SIDE / 3
_MIDDLE = 4.0  # how far a lone thing's centre keeps from the lines between the nine places, in pixels


@dataclass(frozen=True)
class Thing:
    """A coloured shape.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        small: Whether it is small, else large.
        x: Column of its centre in pixels.
        y: Row of its centre.
        radius: In pixels.
    """

    shape: str
    color: str
    small: bool
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        """As in "a small red star"."""
        return f"a {'small' if self.small else 'large'} {self.color} {self.shape}"

    @property
    def look(self) -> tuple[str, str, bool]:
        """Colour, shape and whether it is small."""
        return self.color, self.shape, self.small

    @property
    def place(self) -> str:
        """Which ninth of the picture holds its centre: "top left" to "bottom right"."""
        return f"{ROWS[int(self.y // _THIRD)]} {COLUMNS[int(self.x // _THIRD)]}"


@dataclass(frozen=True)
class Backdrop:
    """What is behind the things.

    Attributes:
        kind: One of `BACKINGS`.
        colors: Two greyish colours: of the whole, or of top and bottom; clutter is drawn on the first.
        seed: Of the lines and speckles.
    """

    kind: Backing
    colors: tuple[Color, Color]
    seed: int


@dataclass(frozen=True)
class Claim:
    """What a caption says; two captions that say the same have equal `key`.

    Attributes:
        looks: Of all things, the related ones first; for a class sentence colour and shape of the only one.
        relation: From the first to the second: one of `RELATIONS`; the place of a lone thing; "" for a class sentence.
        text: The caption.
    """

    looks: tuple[tuple[str, str, bool], ...]
    relation: str
    text: str

    @property
    def is_class(self) -> bool:
        """Whether it names colour and shape of a lone thing and no more."""
        return not self.relation

    @cached_property
    def key(self) -> str:
        """The same for all captions that say the same."""
        if self.is_class:
            return json.dumps(["class", *self.looks[0][:2]])
        first, relation = list(self.looks[:2]), self.relation
        if relation in ("below", "right of"):
            first, relation = first[::-1], _INVERSE[relation]
        return json.dumps([first, relation, sorted(self.looks[2:])])

    def holds(self, picture: Captioned) -> bool:
        """Whether it is true of a picture: of these things, no more, so related."""
        things = picture.things
        if self.is_class:
            return len(things) == 1 and things[0].look[:2] == self.looks[0][:2]
        if sorted(t.look for t in things) != sorted(self.looks):
            return False
        if len(things) == 1:
            return things[0].place == self.relation
        by_look = {t.look: t for t in things}
        return relation_of(by_look[self.looks[0]], by_look[self.looks[1]]) == self.relation


def relation_of(a: Thing, b: Thing) -> str:
    """Where `a` stands from `b`: along the axis on which they are farther apart."""
    across, down = a.x - b.x, a.y - b.y
    if abs(down) > abs(across):
        return "above" if down < 0 else "below"
    return "left of" if across < 0 else "right of"


@dataclass(frozen=True)
class Captioned:
    """A picture before it is drawn, with all that its captions may say.

    Attributes:
        things: One to four that differ in colour or shape; of several, the first two are what captions relate.
        backdrop: What is behind them.
    """

    things: tuple[Thing, ...]
    backdrop: Backdrop

    @cached_property
    def arrangement(self) -> str:
        """Canonical JSON of what stands where: of several things in which of 16 cells, of one on which patch."""
        step = _CELL if len(self.things) > 1 else _PATCH
        return json.dumps([[*t.look, int(t.y // step), int(t.x // step)] for t in sorted(self.things, key=_by_look)])

    @cached_property
    def split(self) -> Split:
        """The split that this arrangement belongs to, by its hash."""
        digest = hashlib.sha256(self.arrangement.encode()).hexdigest()
        return "held-out" if int(digest[:8], 16) % HELD_OUT_SHARE == 0 else "train"

    def claim(self, rng: random.Random) -> Claim:
        """A caption that names every thing, worded by lot."""
        start = "a picture of " if rng.random() < 0.3 else ""
        if len(self.things) == 1:
            thing = self.things[0]
            return Claim((thing.look,), thing.place, f"{start}{thing.words} at the {thing.place}")
        a, b = self.things[:2] if rng.random() < 0.5 else self.things[1::-1]
        rest = list(self.things[2:])
        rng.shuffle(rest)
        relation = relation_of(a, b)
        more = "".join(f" {word} {thing.words}" for word, thing in zip(("with", "and"), rest))
        looks = tuple(thing.look for thing in (a, b, *rest))
        return Claim(looks, relation, f"{start}{a.words} {relation} {b.words}{more}")

    def class_claim(self) -> Claim:
        """The sentence of its class; for pictures of one thing."""
        color, shape, small = self.things[0].look
        return Claim(((color, shape, small),), "", TEMPLATE.format(color, shape))

    def draw(self) -> Image.Image:
        """Draws it as an RGB picture of 128 x 128 pixels, with smooth edges."""
        zoom = OVERSAMPLING
        picture = _draw_backdrop(self.backdrop, zoom)
        draw = ImageDraw.Draw(picture)
        for thing in self.things:
            draw_shape(draw, thing.shape, (thing.x, thing.y), thing.radius, zoom, COLORS[thing.color])
        return picture.reduce(zoom)


def _by_look(thing: Thing) -> tuple[str, str, bool]:
    return thing.look


def _draw_backdrop(backdrop: Backdrop, zoom: int) -> Image.Image:
    side = SIDE * zoom
    first, second = backdrop.colors
    if backdrop.kind == "gradient":
        strip = Image.new("RGB", (1, 2))
        strip.putdata([first, second])
        return strip.resize((side, side), Image.Resampling.BILINEAR)
    picture = Image.new("RGB", (side, side), first)
    if backdrop.kind == "clutter":
        draw, rng = ImageDraw.Draw(picture), random.Random(backdrop.seed)
        for _ in range(rng.randint(6, 14)):
            ends = [rng.uniform(0, side) for _ in range(4)]
            draw.line(ends, fill=_grey(rng), width=round(rng.uniform(0.7, 2.5) * zoom))
        for _ in range(rng.randint(15, 45)):
            x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.6, 2.6) * zoom
            draw.ellipse((x - r, y - r, x + r, y + r), fill=_grey(rng))
    return picture


def _grey(rng: random.Random) -> Color:
    level = rng.randint(50, 205)
    return level, level, level


# ---------------------------------------------------------------------- by lot
def sample(split: Split, number: int, *seed: object, lone: bool = False) -> tuple[Captioned, ...]:
    """Draws a picture of a split and near-duplicates of it: others with one attribute or place changed or exchanged.

    Args:
        split: That all of them belong to.
        number: How many, the first one included.
        *seed: Any values with a stable `str`.
        lone: Whether the first picture shows one large thing among clutter; else one to four things on any backdrop.

    Returns:
        Pictures no two of which say the same.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"pictures are of a split in {SPLITS}; got {split!r}")
    rng = random.Random(":".join(map(str, ("captioned", split, lone, *seed))))
    while True:
        first = _lone(rng, small=False) if lone else _draw(rng)
        if first.split != split:
            continue
        found = [first]
        for _ in range(40 * number):
            if len(found) == number:
                return tuple(found)
            other = _vary(first, rng)
            if other is not None and other.split == split and not any(_alike(other, one) for one in found):
                found.append(other)
        if len(found) == number:
            return tuple(found)


def _alike(a: Captioned, b: Captioned) -> bool:
    """Whether the caption of one holds of the other."""
    fixed = random.Random(0)
    return a.claim(fixed).holds(b) or b.claim(fixed).holds(a)


def _draw(rng: random.Random) -> Captioned:
    number = rng.choices((1, 2, 3, 4), (4, 4, 3, 2))[0]
    if number == 1:
        return _lone(rng, small=rng.random() < 0.4)
    while True:
        cells = rng.sample(range(_GRID**2), number)
        (r0, c0), (r1, c1) = (divmod(cell, _GRID) for cell in cells[:2])
        if abs(r0 - r1) != abs(c0 - c1):  # so that one axis decides
            break
    looks = rng.sample(CLASSES, number)
    things = [
        Thing(shape, color, rng.random() < 0.5, *_in_cell(cell), 0.0) for (color, shape), cell in zip(looks, cells)
    ]
    return _settle(things, rng)


def _lone(rng: random.Random, small: bool) -> Captioned:
    color, shape = rng.choice(CLASSES)
    thing = Thing(shape, color, small, _free(rng), _free(rng), rng.uniform(*_RADII[small]))
    backdrop = _backdrop(rng, "clutter") if not small else _backdrop(rng)
    return Captioned((thing,), backdrop)


def _free(rng: random.Random) -> float:
    """A centre's place on one axis, off the borders and the lines between ninths."""
    edge = _RADII[False][1] + 1
    while True:
        place = rng.uniform(edge, SIDE - edge)
        if min(abs(place - _THIRD), abs(place - 2 * _THIRD)) >= _MIDDLE:
            return place


def _in_cell(cell: int) -> tuple[float, float]:
    row, column = divmod(cell, _GRID)
    return (column + 0.5) * _CELL, (row + 0.5) * _CELL


def _settle(things: Sequence[Thing], rng: random.Random) -> Captioned:
    """Several things in the middles of cells, as a picture: moved and sized a little, on a backdrop."""

    def settled(thing: Thing) -> Thing:
        x, y = ((place // _CELL + 0.5) * _CELL + rng.uniform(-_JITTER, _JITTER) for place in (thing.x, thing.y))
        return replace(thing, x=x, y=y, radius=rng.uniform(*_RADII[thing.small]))

    return Captioned(tuple(settled(thing) for thing in things), _backdrop(rng))


def _backdrop(rng: random.Random, kind: Backing | None = None) -> Backdrop:
    bounds = (215, 255) if rng.random() < 0.5 else (5, 50)
    first, second = ((rng.randint(*bounds), rng.randint(*bounds), rng.randint(*bounds)) for _ in range(2))
    return Backdrop(rng.choice(BACKINGS) if kind is None else kind, (first, second), rng.getrandbits(32))


def _vary(picture: Captioned, rng: random.Random) -> Captioned | None:
    """Another picture that is nearly the same; None where the lot falls on something impossible."""
    things = list(picture.things)
    i = rng.randrange(len(things))
    change = rng.choice(("color", "shape", "size", "place") if len(things) == 1 else ("color", "shape", *_EXCHANGES))
    thing = things[i]
    if change == "color":
        things[i] = replace(thing, color=rng.choice(list(COLORS)))
    elif change == "shape":
        things[i] = replace(thing, shape=rng.choice(SHAPES))
    elif change == "size":
        things[i] = replace(thing, small=not thing.small, radius=rng.uniform(*_RADII[not thing.small]))
    elif change == "place":
        things[i] = replace(thing, x=_free(rng), y=_free(rng))
    else:
        j, k = rng.sample(range(len(things)), 2) if change != "exchange places" else (0, 1)
        names = _EXCHANGES[change]
        first, second = ({name: getattr(things[m], name) for name in names} for m in (j, k))
        things[j], things[k] = replace(things[j], **second), replace(things[k], **first)
    if len({t.look[:2] for t in things}) < len(things):
        return None
    if len(things) == 1:
        return Captioned(tuple(things), _backdrop(rng, picture.backdrop.kind))
    return _settle(things, rng)


_EXCHANGES = {
    "exchange colors": ("color",),
    "exchange shapes": ("shape",),
    "exchange sizes": ("small",),
    "exchange places": ("x", "y"),
}
