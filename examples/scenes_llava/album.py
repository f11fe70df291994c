"""The training pages, drawn once into memory-mapped files: pixels, what the patches show, tokenised questions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_llava.arrays import fill_arrays
from tiny_llava.processor import ASSISTANT, EOS, PAD, USER

from scenes_llava.processor import ids, index
from scenes_llava.targets import ATTRIBUTES, GRIDS, KINDS, MARKS, read_marks, read_patches, shown_kinds
from vlmtok.evaluation.scenes.layouts import sample_page
from vlmtok.evaluation.scenes.page import SIZE, Layout, Page, Split
from vlmtok.evaluation.scenes.painting import COLORS
from vlmtok.evaluation.scenes.questions import LAYOUT_OF, Question, ask, ask_turns, ask_two

QUESTIONS = 10
LENGTH = 28
"""Tokens of a question, an earlier turn and the answer at most."""
DECIDING = 9
_MIX: tuple[Layout, ...] = ("scene", "scene", "table", "scene", "scene", "chart", "scene", "scene")
_SCENE_KINDS = (
    *("color", "shape", "small object", "small object", "where", "count", "count many"),
    *("number", "fine print", "fine print"),
)
KIND_NAMES = (*LAYOUT_OF, "second turn", "two pictures")


def _columns() -> dict[str, tuple[tuple[int, ...], type]]:
    slots = {
        "text": ((QUESTIONS, LENGTH), np.int16),  # token ids
        "target": ((QUESTIONS, LENGTH), np.int16),  # the next token where it belongs to an answer, else -100
        "step": ((QUESTIONS, LENGTH), np.int8),  # which digit comes next, from 1, or 0
        "answering": ((QUESTIONS, LENGTH), bool),  # whether a word of the answer comes next, not its end
        "deciding": ((QUESTIONS, DECIDING), np.int8),  # marks, then -1
        "earlier": ((QUESTIONS, DECIDING), np.int8),  # marks that decide the earlier turn
        "turn": ((QUESTIONS, LENGTH), np.int8),  # 0 in the earlier turn, 1 in the last
        "kind": ((QUESTIONS,), np.int8),  # of KIND_NAMES, -1 for none
        "which": ((QUESTIONS,), np.int8),  # which of two pages decides
    }
    columns: dict[str, tuple[tuple[int, ...], type]] = {
        "pixels": ((SIZE, SIZE, 3), np.uint8),
        "marks": ((MARKS, len(ATTRIBUTES)), np.int8),
        "shown": ((len(KINDS) + len(COLORS) + 9,), np.float32),
    }
    for grid in GRIDS:
        columns |= {f"{name}{grid}": ((grid * grid,), np.int8) for name in ("owner", "step", "center", "fair")}
    columns |= {f"q_{name}": slot for name, slot in slots.items()}
    columns |= {f"two_{name}": slot for name, slot in slots.items()}
    return columns


@dataclass(frozen=True)
class Album:
    """Pages of a split as arrays, `[N, ...]` each; see `_columns`. Page i's pair is page `pairs[i]`."""

    arrays: dict[str, np.ndarray]
    pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.pairs)


def _layout(i: int) -> Layout:
    return _MIX[i % len(_MIX)]


def _pair(i: int, number: int) -> int:
    """The next scene after a page; scenes alone have pairs."""
    return next(j % number for j in range(i + 1, i + len(_MIX) + 2) if _layout(j % number) == "scene")


def _page(split: Split, seed: int, i: int) -> Page:
    return sample_page(split, _layout(i), seed, i)


def draw_album(folder: Path, split: Split, seed: int, number: int, workers: int) -> Album:
    """Draws `number` pages of a split, once; later calls open what is there.

    Args:
        folder: Gets the files, 130 KB a page.
        split: Of the pages.
        seed: Of the pages and questions.
        number: Of pages, a multiple of eight.
        workers: Processes that draw.
    """
    key = {"split": split, "seed": seed, "number": number}
    arrays = fill_arrays(folder, key, _columns(), _draw, workers)
    return Album(arrays, np.array([_pair(i, number) for i in range(number)]))


def _draw(arrays: dict[str, np.ndarray], key: dict[str, Any], rows: range) -> None:
    split, seed, number = key["split"], key["seed"], key["number"]
    for i in rows:
        page = _page(split, seed, i)
        arrays["pixels"][i] = np.asarray(page.draw())
        arrays["marks"][i], arrays["shown"][i] = read_marks(page), shown_kinds(page)
        for grid in GRIDS:
            patches = read_patches(page, grid)
            for name in ("owner", "step", "center", "fair"):
                arrays[f"{name}{grid}"][i] = getattr(patches, name)
        rng = random.Random(f"questions:{split}:{seed}:{i}")
        _fill(arrays, "q", i, [(turns, 0) for turns in _questions(page, rng)])
        other = _page(split, seed, _pair(i, number))
        drawn = [ask_two((page, other), rng) for _ in range(QUESTIONS)] if page.layout == "scene" else []
        _fill(arrays, "two", i, [((found[1],), found[0]) for found in drawn if found is not None])


def _questions(page: Page, rng: random.Random) -> list[tuple[Question, ...]]:
    """Up to ten questions about a page; one of a scene's comes in a second turn."""
    if page.layout != "scene":
        kind = {"table": "table", "chart": "chart"}[page.layout]
        drawn = {q.text: q for q in (ask(page, kind, rng) for _ in range(3 * QUESTIONS)) if q is not None}
        return [(question,) for question in list(drawn.values())[:QUESTIONS]]
    found = [(q,) for q in (ask(page, kind, rng) for kind in _SCENE_KINDS[: QUESTIONS - 1]) if q is not None]
    pair = ask_turns(page, rng)
    return [*found, *([pair] if pair else [])]


def _fill(arrays: dict[str, np.ndarray], prefix: str, i: int, asked: list[tuple[tuple[Question, ...], int]]) -> None:
    """Writes the questions of page `i`, each with its turns and the page that decides it."""
    blank = {"text": ids(PAD)[0], "target": -100, "deciding": -1, "earlier": -1, "kind": -1}
    for name in ("text", "target", "step", "answering", "deciding", "earlier", "turn", "kind", "which"):
        arrays[f"{prefix}_{name}"][i] = blank.get(name, 0)
    for slot, (turns, which) in enumerate(asked):
        text: list[int] = []
        for number, question in enumerate(turns):
            answer = ids(question.answer)
            text += (ids(USER) if number else ()) + ids(question.text) + ids(ASSISTANT)
            at = slice(len(text) - 1, len(text) + len(answer) - 1)
            arrays[f"{prefix}_target"][i, slot, at] = answer
            arrays[f"{prefix}_target"][i, slot, at.stop] = ids(EOS)[0]
            arrays[f"{prefix}_answering"][i, slot, at] = True
            if answer[0] in _DIGITS and not question.kind.startswith("count"):
                arrays[f"{prefix}_step"][i, slot, at] = np.arange(1, len(answer) + 1)
            text += answer + (ids(EOS) if number + 1 < len(turns) else ())
            place = "deciding" if number + 1 == len(turns) else "earlier"
            arrays[f"{prefix}_{place}"][i, slot, : len(question.marks)] = question.marks
            arrays[f"{prefix}_turn"][i, slot, at.start :] = number + 1 == len(turns)
        if len(text) > LENGTH:
            raise ValueError(f"a question takes {len(text)} tokens, more than {LENGTH}: {turns}")
        arrays[f"{prefix}_text"][i, slot, : len(text)] = text
        arrays[f"{prefix}_kind"][i, slot] = KIND_NAMES.index("second turn" if len(turns) > 1 else turns[0].kind)
        arrays[f"{prefix}_which"][i, slot] = which


_DIGITS = frozenset(index()[digit] for digit in "0123456789")
