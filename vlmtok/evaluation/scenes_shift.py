"""Task `scenes-shift`: zero-shot classes of pictures with noise, blur or low contrast, a stream of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import ParameterError
from ..loading.models import Loaded
from .dual import check_dual, classify, give_cross_tokens, see
from .scenes.galleries import Shown, lone_pictures
from .scenes.shifts import SEVERITIES, shift
from .scenes_clip import SENTENCES, drawn
from .task import Item, Outcome

CLEAN = "clean"
QUESTIONS = 3000


@dataclass(frozen=True)
class Shifted:
    """A picture and what is done to it.

    Attributes:
        shown: The picture and its class.
        shift: One of `SEVERITIES`, or "" for nothing.
        severity: From 1.
    """

    shown: Shown
    shift: str = ""
    severity: int = 0


class ScenesShift:
    """The same held-out pictures of one thing, as they are and made worse; which of 48 classes.

    Pictures of a kind are a stream in the order of the questions. A method that adapts to it (TCA) starts anew with
    every kind and corrects its predictions through `vlmtok.zero_shot`; its result depends on how long the stream is.

    Args:
        severities: of noise, blur and contrast, from 1 to 5.
        seed: another seed is another exam.
        cross_tokens: as for `ScenesClip`.
    """

    name = "scenes-shift"
    about = "zero-shot classes of a dual encoder under noise, blur and low contrast, each kind one stream of pictures"
    model = "scenes-clip"
    language = False

    def __init__(self, severities: Sequence[int] = (1, 3, 5), seed: str = "exam", cross_tokens: bool = True) -> None:
        levels = [severities] if isinstance(severities, int) else list(severities)
        if not levels or any(level not in range(1, 6) for level in levels):
            raise ParameterError(f"scenes-shift: severities must be from 1 to 5, got {levels}")
        self._kinds = [("", 0), *((kind, level) for kind in SEVERITIES for level in levels)]
        self._seed, self._trained = seed, cross_tokens
        self.settings = {} if cross_tokens else {"cross_tokens": "untrained"}

    def items(self, limit: int | None) -> Sequence[Item]:
        """Questions, kinds in turn."""
        number = limit or QUESTIONS
        lone = lone_pictures(-(-number // len(self._kinds)), self._seed)
        found = []
        for i in range(number):
            (kind, level), shown = self._kinds[i % len(self._kinds)], lone[i // len(self._kinds)]
            name = f"{kind} {level}" if kind else CLEAN
            found.append(Item(f"{shown.id}-{name.replace(' ', '-')}", name, Shifted(shown, kind, level)))
        return found

    def check(self, loaded: Loaded) -> None:
        """Refuses whatever is no dual encoder."""
        check_dual(loaded, self.name)

    def batches(self, loaded: Loaded, items: Sequence[Item], size: int) -> list[list[int]]:
        """All questions of a kind together, whatever `size` says: a stream is not cut."""
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(item.kind, []).append(i)
        return list(groups.values())

    def pictures(self, item: Item) -> list[Image.Image]:
        """The picture, made worse."""
        asked: Shifted = item.what
        picture = drawn(asked.shown.picture)
        return [shift(picture, asked.shift, asked.severity, asked.shown.id) if asked.shift else picture]

    def answer(self, loaded: Loaded, items: Sequence[Item]) -> list[Outcome]:
        """The nearest class, kind by kind."""
        if self._trained:
            give_cross_tokens(loaded)
        told = classify(loaded, [self.pictures(item)[0] for item in items], SENTENCES)
        return [Outcome(float(SENTENCES[i] == item.what.shown.caption), SENTENCES[i]) for i, item in zip(told, items)]

    def probe(self, loaded: Loaded, item: Item) -> None:
        """The vision tower on the picture."""
        see(loaded, self.pictures(item))
