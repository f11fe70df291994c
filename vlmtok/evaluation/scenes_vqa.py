"""Task `scenes-vqa`: questions about rendered pages that a method can only answer from what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from ..errors import ParameterError
from ..loading.models import Loaded
from .dialogue import Dialogue, answer, check_chat, encode, lengths
from .scenes import KINDS, exam
from .scenes.page import Page
from .task import Item, Outcome

QUESTIONS = 1200
MAX_NEW_TOKENS = 6


class ScenesVqa:
    """Held-out questions of twelve kinds, right to the letter or wrong.

    Args:
        kinds: of questions, of `scenes.KINDS`.
        seed: another seed is another exam.
    """

    name = "scenes-vqa"
    about = "questions about rendered pages: shapes, numbers in small print, tables, charts, two pictures, two turns"
    model = "scenes-llava"
    language = True

    def __init__(self, kinds: Sequence[str] = KINDS, seed: str = "exam") -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ParameterError(
                f"scenes-vqa has no kind {', '.join(map(repr, unknown))}; there are {', '.join(KINDS)}"
            )
        self._kinds, self._seed = tuple(kinds), seed
        self.settings = {} if seed == "exam" else {"exam": seed}

    def items(self, limit: int | None) -> Sequence[Item]:
        """Questions, kinds in turn."""
        return [Item(asked.id, asked.kind, asked) for asked in exam(limit or QUESTIONS, self._kinds, self._seed)]

    def check(self, loaded: Loaded) -> None:
        """Refuses towers, and processors without a chat template."""
        check_chat(loaded)

    def batches(self, loaded: Loaded, items: Sequence[Item], size: int) -> list[list[int]]:
        """Questions of one kind whose rows are of one length, so that no row is padded."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault((item.kind, *lengths(loaded, self._dialogue(item))), []).append(i)
        return [rows[first : first + size] for rows in groups.values() for first in range(0, len(rows), size)]

    def pictures(self, item: Item) -> list[Image.Image]:
        """The pages, drawn."""
        return [_drawn(page) for page in item.what.pictures]

    def answer(self, loaded: Loaded, items: Sequence[Item]) -> list[Outcome]:
        """Greedy answers."""
        given = answer(loaded, [self._dialogue(item) for item in items], MAX_NEW_TOKENS)
        return [Outcome(float(text == item.what.answer), text) for item, text in zip(items, given)]

    def probe(self, loaded: Loaded, item: Item) -> None:
        """The first token of the first turn."""
        inputs = encode(loaded, [self._dialogue(item)])
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)  # type: ignore[operator]

    def _dialogue(self, item: Item) -> Dialogue:
        return Dialogue(tuple(self.pictures(item)), item.what.turns, item.what.question)


@lru_cache(maxsize=4096)
def _drawn(page: Page) -> Image.Image:
    return page.draw()
