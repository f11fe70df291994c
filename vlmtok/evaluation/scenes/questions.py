"""Questions with one right answer about pages, by kind, and the exam that tasks ask."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .layouts import sample_page
from .page import Layout, Mark, Page
from .painting import COLORS, SHAPES

PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
ORDINALS = ("first", "second")
FEW, MANY = range(1, 6), range(6, 10)


@dataclass(frozen=True)
class Question:
    """A question about one page.

    Attributes:
        kind: One of the kinds that `ask` knows.
        text: The question.
        answer: Its right answer; digits of a number stand apart: "4 0 7".
        marks: Which marks of the page decide the answer.
    """

    kind: str
    text: str
    answer: str
    marks: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """One question of an exam.

    Attributes:
        id: Kind and number: "fine print/0017".
        kind: One of `KINDS`.
        pictures: The page, or the two, that it is about.
        turns: Earlier questions about the same pages with their right answers.
        question: The question.
        answer: The only right answer.
    """

    id: str
    kind: str
    pictures: tuple[Page, ...]
    turns: tuple[tuple[str, str], ...]
    question: str
    answer: str


def ask(page: Page, kind: str, rng: random.Random) -> Question | None:
    """Draws an unambiguous question of a kind about a page, or None where the page has none."""
    drawn = _ASKING[kind](page, rng)
    if drawn is None:
        return None
    text, answer, marks = drawn
    places = {id(mark): i for i, mark in enumerate(page.marks)}
    return Question(kind, text, answer, tuple(places[id(mark)] for mark in marks))


def ask_two(pages: tuple[Page, Page], rng: random.Random) -> tuple[int, Question] | None:
    """Draws a question about two scenes: which page decides it, and the question, or None.

    Either the colour of a shape on one of them, of which the other may show one as well, or which of them shows it.
    """
    which = rng.randrange(2)
    page, other = pages[which], pages[1 - which]
    if rng.random() < 0.5:
        question = ask(page, "color", rng)
        if question is None:
            return None
        text = question.text.replace("?", f" in the {ORDINALS[which]} picture?")
        return which, Question("two pictures", text, question.answer, question.marks)
    there = {(m.kind, m.color) for m in other.marks}
    mark = _choose([m for m in page.marks if m.is_shape and not m.small and (m.kind, m.color) not in there], rng)
    if mark is None:
        return None
    same = tuple(i for i, m in enumerate(page.marks) if (m.kind, m.color) == (mark.kind, mark.color))
    return which, Question("two pictures", f"Which picture shows a {mark.color} {mark.kind}?", ORDINALS[which], same)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds

_T = TypeVar("_T")
_Drawn = tuple[str, str, Sequence[Mark]] | None


def _choose(items: Sequence[_T], rng: random.Random) -> _T | None:
    return rng.choice(items) if items else None


def _shapes(page: Page) -> list[Mark]:
    return [mark for mark in page.marks if mark.is_shape]


def _alone(marks: Sequence[Mark], name: Callable[[Mark], object]) -> list[Mark]:
    """Those whose name no other of them has."""
    counts = Counter(map(name, marks))
    return [mark for mark in marks if counts[name(mark)] == 1]


def _ask_color(page: Page, rng: random.Random) -> _Drawn:
    mark = _choose([m for m in _alone(_shapes(page), lambda m: m.kind) if not m.small], rng)
    return None if mark is None else (f"What color is the {mark.kind}?", mark.color, [mark])


def _ask_shape(page: Page, rng: random.Random) -> _Drawn:
    mark = _choose([m for m in _alone(_shapes(page), lambda m: m.color) if not m.small], rng)
    return None if mark is None else (f"Which shape is {mark.color}?", mark.kind, [mark])


def _ask_small(page: Page, rng: random.Random) -> _Drawn:
    small = [m for m in _shapes(page) if m.small]
    if rng.random() < 0.5:
        mark = _choose(_alone(small, lambda m: m.kind), rng)
        return None if mark is None else (f"What color is the small {mark.kind}?", mark.color, [mark])
    mark = _choose(_alone(small, lambda m: m.color), rng)
    return None if mark is None else (f"Which small shape is {mark.color}?", mark.kind, [mark])


def _ask_where(page: Page, rng: random.Random) -> _Drawn:
    mark = _choose([m for m in _alone(_shapes(page), lambda m: (m.kind, m.color)) if not m.small], rng)
    return None if mark is None else (f"Where is the {mark.color} {mark.kind}?", mark.place, [mark])


def _count(answers: range) -> Callable[[Page, random.Random], _Drawn]:
    def draw(page: Page, rng: random.Random) -> _Drawn:
        shapes = _shapes(page)
        groups = [(f"{PLURALS[kind]}", [m for m in shapes if m.kind == kind]) for kind in SHAPES]
        groups += [(f"{color} shapes", [m for m in shapes if m.color == color]) for color in COLORS]
        fitting = {
            len(marks): (name, marks) for name, marks in rng.sample(groups, len(groups)) if len(marks) in answers
        }
        # By answer first: small groups are many, and large ones would hardly be asked for.
        answer = _choose(sorted(fitting), rng)
        if answer is None:
            return None
        name, marks = fitting[answer]
        return f"How many {name} are there?", str(answer), marks

    return draw


def _number(size: str) -> Callable[[Page, random.Random], _Drawn]:
    def draw(page: Page, rng: random.Random) -> _Drawn:
        mark = _choose([m for m in page.marks if m.kind == "plate" and m.size == size], rng)
        return None if mark is None else (f"What number is on the {mark.color} plate?", " ".join(mark.text), [mark])

    return draw


def _ask_table(page: Page, rng: random.Random) -> _Drawn:
    mark = _choose([m for m in page.marks if m.kind == "cell"], rng)
    if mark is None:
        return None
    text = f"What number is in the {mark.color} column and the {mark.row} row?"
    return text, " ".join(mark.text), [mark]


def _ask_chart(page: Page, rng: random.Random) -> _Drawn:
    mark = _choose([m for m in page.marks if m.kind == "bar"], rng)
    return None if mark is None else (f"How high is the {mark.color} bar?", mark.text, [mark])


_ASKING: dict[str, Callable[[Page, random.Random], _Drawn]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "small object": _ask_small,
    "where": _ask_where,
    "count": _count(FEW),
    "count many": _count(MANY),
    "number": _number("large"),
    "fine print": _number("fine"),
    "table": _ask_table,
    "chart": _ask_chart,
}
_LAYOUTS: dict[str, Layout] = {"table": "table", "chart": "chart"}
LAYOUT_OF: dict[str, Layout] = {kind: _LAYOUTS.get(kind, "scene") for kind in _ASKING}
"""The kinds of questions about one page, and the layout that each is about."""
KINDS = (*_ASKING, "two pictures", "second turn")


# ---------------------------------------------------------------------------------------------------------------------
# The exam


def exam(number: int, kinds: Sequence[str] = KINDS, seed: str = "exam") -> list[Asked]:
    """Draws questions about held-out pages, each about pages of its own, the kinds in turn.

    Args:
        number: How many.
        kinds: Of `KINDS`.
        seed: Another seed is another exam.

    Raises:
        ValueError: a kind is none of `KINDS`.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
    asked = []
    for index in range(number):
        kind, turn = kinds[index % len(kinds)], index // len(kinds)
        asked.append(_draw(kind, f"{kind}/{turn:04d}", seed))
    return asked


def _draw(kind: str, name: str, seed: str) -> Asked:
    attempt = 0
    while True:
        rng = random.Random(f"{seed}:{name}:{attempt}")
        key = (seed, name, attempt)
        attempt += 1
        if kind == "two pictures":
            pages = (sample_page("held-out", "scene", *key, 0), sample_page("held-out", "scene", *key, 1))
            found = ask_two(pages, rng)
            if found is not None:
                return Asked(name, kind, pages, (), found[1].text, found[1].answer)
        elif kind == "second turn":
            page = sample_page("held-out", "scene", *key)
            pair = ask_turns(page, rng)
            if pair is not None:
                first, second = pair
                return Asked(name, kind, (page,), ((first.text, first.answer),), second.text, second.answer)
        else:
            page = sample_page("held-out", LAYOUT_OF[kind], *key)
            question = ask(page, kind, rng)
            if question is not None:
                return Asked(name, kind, (page,), (), question.text, question.answer)


def ask_turns(page: Page, rng: random.Random) -> tuple[Question, Question] | None:
    """Draws two questions about a scene that other marks decide, or None; neither counts."""
    kinds = [kind for kind, layout in LAYOUT_OF.items() if layout == "scene" and not kind.startswith("count")]
    first, second = (ask(page, kind, rng) for kind in rng.sample(kinds, 2))
    if first is None or second is None or set(first.marks) & set(second.marks):
        return None
    return first, second
