"""The little world of the checkpoint: scenes, the pictures drawn of them, the questions asked about them.

A scene holds four to seven things in the nine cells of a 3 x 3 grid, each a coloured shape or digit. The split is
decided by the arrangement alone (what stands in which cell): a held-out arrangement never occurs in training, whatever
its background, sizes or offsets.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from vlmtok.evaluation.scenes.painting import COLORS, DIGITS, OVERSAMPLING, SHAPES, draw_digit, draw_shape

SIZE = 96
CELL = SIZE // 3
KINDS = SHAPES + DIGITS
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COUNTS = range(4)
QUESTION_TYPES = ("color", "shape", "digit", "count", "where", "what is at")

Split = Literal["train", "held-out"]
HELD_OUT_SHARE = 16  # one arrangement in sixteen is held out


@dataclass(frozen=True)
class Thing:
    """One coloured shape or digit.

    Attributes:
        kind: One of `KINDS`.
        color: One of `COLORS`.
        cell: Cell of the 3 x 3 grid in raster order; the whole thing lies inside it.
        x: Column of its centre in pixels of a 96 px picture.
        y: Row of its centre.
        r: Radius of the circle around it in pixels.
    """

    kind: str
    color: str
    cell: int
    x: float
    y: float
    r: float

    @property
    def is_digit(self) -> bool:
        """Whether it is a digit."""
        return self.kind in DIGITS


@dataclass(frozen=True)
class Scene:
    """A background colour (RGB) and the things on it, in the order of their cells."""

    background: tuple[int, int, int]
    things: tuple[Thing, ...]

    @cached_property
    def arrangement(self) -> str:
        """Canonical JSON of what stands where, without sizes, offsets and background."""
        return json.dumps([[t.cell, t.kind, t.color] for t in self.things], separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the arrangement."""
        return hashlib.sha256(self.arrangement.encode()).hexdigest()

    @property
    def split(self) -> Split:
        """The split this arrangement belongs to, by its hash."""
        return "held-out" if int(self.digest[:8], 16) % HELD_OUT_SHARE == 0 else "train"


@dataclass(frozen=True)
class Question:
    """A question with its only right answer.

    Attributes:
        type: One of `QUESTION_TYPES`.
        text: The question.
        answer: One to three words.
        cells: Where one has to look: the cells of the things that decide the answer (none where the answer is 0).
    """

    type: str
    text: str
    answer: str
    cells: tuple[int, ...]

    @property
    def attention(self) -> float:
        """Share of its attention that a head may pay to the things that decide the answer.

        All of it to a single thing; to n counted ones n / (n + 2), so that the amount tells how many there are.
        """
        return len(self.cells) / (len(self.cells) + 2) if self.type == "count" else 1.0


def sample_scene(split: Split, *seed: object) -> Scene:
    """Draws the scene of a split that belongs to a seed (any values with a stable `str`)."""
    rng = random.Random(":".join(map(str, (split, *seed))))
    while True:
        scene = _sample(rng)
        if scene.split == split:
            return scene


def _sample(rng: random.Random) -> Scene:
    number = rng.randint(4, 7)
    digits = rng.choice((1, 1, 2))
    kinds = [rng.choice(SHAPES) for _ in range(number - digits)] + rng.sample(DIGITS, digits)
    colors = [rng.choice(list(COLORS)) for _ in range(number)]
    # Half of the scenes repeat a shape, half a colour, two to four times: otherwise large counts would be rare.
    repeats = rng.randint(2, min(4, number - digits))
    values, pool = (kinds, SHAPES) if rng.random() < 0.5 else (colors, tuple(COLORS))
    theme = rng.choice(pool)
    others = [value for value in pool if value != theme]
    for i in range(number if pool is not SHAPES else number - digits):
        values[i] = theme if i < repeats else rng.choice(others)
    pairs = list(zip(kinds, colors))
    rng.shuffle(pairs)
    cells = sorted(rng.sample(range(9), number))
    low, high = (226, 255) if rng.random() < 0.5 else (8, 44)
    background = (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))
    return Scene(background, tuple(_place(kind, color, cell, rng) for (kind, color), cell in zip(pairs, cells)))


def _place(kind: str, color: str, cell: int, rng: random.Random) -> Thing:
    radius = round(rng.uniform(9.5, 12.0), 1)
    room = CELL / 2 - radius - 1
    row, column = divmod(cell, 3)
    x = round((column + 0.5) * CELL + rng.uniform(-room, room), 1)
    y = round((row + 0.5) * CELL + rng.uniform(-room, room), 1)
    return Thing(kind, color, cell, x, y, radius)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def render(scene: Scene, scale: int = 1) -> Image.Image:
    """Draws a scene as an RGB picture of `96 * scale` pixels a side, with smooth edges."""
    zoom = scale * OVERSAMPLING
    picture = Image.new("RGB", (SIZE * zoom, SIZE * zoom), scene.background)
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        center, color = (thing.x, thing.y), COLORS[thing.color]
        if thing.is_digit:
            draw_digit(draw, thing.kind, center, (0.52 * thing.r, 0.8 * thing.r), 0.3 * thing.r, zoom, color)
        else:
            draw_shape(draw, thing.kind, center, thing.r, zoom, color)
    return picture.reduce(OVERSAMPLING)


def add_noise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds uniform pixel noise of a strength of 0 to 8 levels to `uint8` pixels of any shape."""
    strength = int(rng.integers(0, 9))
    noise = rng.integers(-strength, strength + 1, pixels.shape, dtype=np.int16)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Questions

_T = TypeVar("_T")
_Drawn = tuple[str, str, list[Thing]]  # question, answer, the things that decide it


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """Draws an unambiguous question of a type about a scene, or None where the scene has none."""
    drawn = _QUESTIONS[kind](scene, rng)
    if drawn is None:
        return None
    text, answer, things = drawn
    return Question(kind, text, answer, tuple(thing.cell for thing in things))


def ask_all(scene: Scene, rng: random.Random, counts: int = 1) -> list[Question]:
    """Draws a question of every type that the scene has, `counts` of them to count things, in random order."""
    drawn = [ask(scene, kind, rng) for kind in (*QUESTION_TYPES, *["count"] * (counts - 1))]
    questions = [question for question in drawn if question is not None]
    rng.shuffle(questions)
    return questions


def exam(number: int, *seed: object) -> list[tuple[Scene, Question]]:
    """Draws held-out questions, each about a scene of its own, the types in turn."""
    drawn: list[tuple[Scene, Question]] = []
    attempt = 0
    while len(drawn) < number:
        scene = sample_scene("held-out", *seed, attempt)
        question = ask(scene, QUESTION_TYPES[len(drawn) % len(QUESTION_TYPES)], random.Random(f"{seed}:{attempt}"))
        attempt += 1
        if question is not None:
            drawn.append((scene, question))
    return drawn


def _name(scene: Scene, thing: Thing, rng: random.Random) -> str | None:
    """A phrase that fits this thing alone, or None: `star`, `7`, `red thing` or `red star`."""
    same_kind = sum(t.kind == thing.kind for t in scene.things)
    same_color = sum(t.color == thing.color for t in scene.things)
    same_both = sum(t.kind == thing.kind and t.color == thing.color for t in scene.things)
    names = []
    if same_kind == 1:
        names += [thing.kind] * 3
    if same_color == 1:
        names += [f"{thing.color} thing"]
    if same_both == 1:
        names += [f"{thing.color} {thing.kind}"]
    return rng.choice(names) if names else None


def _ask_color(scene: Scene, rng: random.Random) -> _Drawn | None:
    kinds = Counter(t.kind for t in scene.things)
    thing = _choose([t for t in scene.things if kinds[t.kind] == 1], rng)
    if thing is None:
        return None
    name = thing.kind
    if thing.is_digit and sum(t.is_digit for t in scene.things) == 1 and rng.random() < 0.5:
        name = "digit"
    text = rng.choice((f"What color is the {name}?", f"What is the color of the {name}?"))
    return text, thing.color, [thing]


def _ask_shape(scene: Scene, rng: random.Random) -> _Drawn | None:
    colors = Counter(t.color for t in scene.things if not t.is_digit)
    thing = _choose([t for t in scene.things if not t.is_digit and colors[t.color] == 1], rng)
    if thing is None:
        return None
    return rng.choice(("What", "Which")) + f" shape is {thing.color}?", thing.kind, [thing]


def _ask_digit(scene: Scene, rng: random.Random) -> _Drawn | None:
    digits = [t for t in scene.things if t.is_digit]
    if len(digits) == 1 and rng.random() < 0.5:
        return "Which digit is shown?", digits[0].kind, digits
    colors = Counter(t.color for t in digits)
    thing = _choose([t for t in digits if colors[t.color] == 1], rng)
    return None if thing is None else (f"Which digit is {thing.color}?", thing.kind, [thing])


def _ask_count(scene: Scene, rng: random.Random) -> _Drawn | None:
    kinds = Counter(t.kind for t in scene.things)
    colors = Counter(t.color for t in scene.things)
    # Few scenes show a group of a given size above one; the weights make the four answers about equally frequent.
    answer = rng.choices(COUNTS, weights=(1.0, 1.2, 1.3, 2.2))[0]
    subject = _choose(
        [shape for shape in SHAPES if kinds[shape] == answer] + [color for color in COLORS if colors[color] == answer],
        rng,
    )
    if subject is None:
        return None
    counted = [t for t in scene.things if subject in (t.kind, t.color)]
    return f"How many {PLURALS.get(subject, f'{subject} things')} are there?", str(answer), counted


def _ask_where(scene: Scene, rng: random.Random) -> _Drawn | None:
    thing = rng.choice(scene.things)
    name = _name(scene, thing, rng)
    return None if name is None else (f"Where is the {name}?", PLACES[thing.cell], [thing])


def _ask_what_is_at(scene: Scene, rng: random.Random) -> _Drawn | None:
    thing = rng.choice(scene.things)
    preposition = rng.choice(("at", "in"))
    return f"What is {preposition} the {PLACES[thing.cell]}?", f"{thing.color} {thing.kind}", [thing]


def _choose(items: list[_T], rng: random.Random) -> _T | None:
    return rng.choice(items) if items else None


_QUESTIONS: dict[str, Callable[[Scene, random.Random], _Drawn | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "digit": _ask_digit,
    "count": _ask_count,
    "where": _ask_where,
    "what is at": _ask_what_is_at,
}
