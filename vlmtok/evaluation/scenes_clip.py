"""Task `scenes-clip`: a dual encoder classifies rendered pictures, and searches pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image

from ..errors import ParameterError
from ..loading.models import Loaded
from .dual import check_dual, classify, give_cross_tokens, read, see
from .scenes.captioned import CLASSES, TEMPLATE, Captioned
from .scenes.galleries import GALLERY, Shown, gallery, lone_pictures
from .task import Item, Outcome

KINDS = ("zero-shot", "picture to text", "text to picture")
QUESTIONS = 1200
SENTENCES = tuple(TEMPLATE.format(*one) for one in CLASSES)
"""Of the 48 classes."""


@dataclass(frozen=True)
class Query:
    """What is asked about.

    Attributes:
        shown: The picture and its caption.
        gallery: Number of the gallery that is searched; None for classification.
    """

    shown: Shown
    gallery: int | None = None


class ScenesClip:
    """Held-out pictures: which of 48 classes; the caption of a picture, and the picture of a caption, among a hundred.

    All questions of a kind, or of a gallery, are asked together: retrieval compares all of them, and what adapts to
    a stream of pictures (TCA) needs the stream.

    Args:
        kinds: of questions, of `KINDS`.
        seed: another seed is another exam.
        cross_tokens: give CrossGET with ``guidance=cross`` the cross tokens that were trained on the checkpoint, where
            its folder holds some; False leaves them untrained.
    """

    name = "scenes-clip"
    about = "a dual encoder on rendered pictures: zero-shot classes, and retrieval among near-duplicates both ways"
    model = "scenes-clip"
    language = False

    def __init__(self, kinds: Sequence[str] = KINDS, seed: str = "exam", cross_tokens: bool = True) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ParameterError(
                f"scenes-clip has no kind {', '.join(map(repr, unknown))}; there are {', '.join(KINDS)}"
            )
        self._kinds, self._seed, self._trained = tuple(kinds), seed, cross_tokens
        self.settings = {} if cross_tokens else {"cross_tokens": "untrained"}

    def items(self, limit: int | None) -> Sequence[Item]:
        """Questions, kinds in turn."""
        number = limit or QUESTIONS
        lone = lone_pictures(-(-number // len(self._kinds)), self._seed) if KINDS[0] in self._kinds else []
        found = []
        for i in range(number):
            kind, place = self._kinds[i % len(self._kinds)], i // len(self._kinds)
            if kind == KINDS[0]:
                found.append(Item(lone[place].id, kind, Query(lone[place])))
            else:
                which, inside = divmod(place, GALLERY)
                shown = _gallery(which, self._seed)[inside]
                found.append(Item(f"{shown.id}-{kind.replace(' ', '-')}", kind, Query(shown, which)))
        return found

    def check(self, loaded: Loaded) -> None:
        """Refuses whatever is no dual encoder."""
        check_dual(loaded, self.name)

    def batches(self, loaded: Loaded, items: Sequence[Item], size: int) -> list[list[int]]:
        """All questions of a gallery together, and all zero-shot ones, whatever `size` says."""
        groups: dict[int | None, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(item.what.gallery, []).append(i)
        return list(groups.values())

    def pictures(self, item: Item) -> list[Image.Image]:
        """The picture that is asked about, or that is to be found."""
        return [drawn(item.what.shown.picture)]

    def answer(self, loaded: Loaded, items: Sequence[Item]) -> list[Outcome]:
        """The nearest class, caption or picture."""
        if self._trained:
            give_cross_tokens(loaded)
        found: dict[int, Outcome] = {}
        lone = [i for i, item in enumerate(items) if item.what.gallery is None]
        if lone:
            told = classify(loaded, [self.pictures(items[i])[0] for i in lone], SENTENCES)
            for i, one in zip(lone, told):
                found[i] = Outcome(float(SENTENCES[one] == items[i].what.shown.caption), SENTENCES[one])
        for which in sorted({item.what.gallery for item in items if item.what.gallery is not None}):
            inside = [i for i, item in enumerate(items) if item.what.gallery == which]
            found |= dict(zip(inside, self._search(loaded, which, [items[i] for i in inside])))
        return [found[i] for i in range(len(items))]

    def probe(self, loaded: Loaded, item: Item) -> None:
        """The vision tower on the picture."""
        see(loaded, self.pictures(item))

    def _search(self, loaded: Loaded, which: int, items: Sequence[Item]) -> list[Outcome]:
        shown = _gallery(which, self._seed)
        table = see(loaded, [drawn(one.picture) for one in shown]) @ read(loaded, [one.caption for one in shown]).T
        if not torch.isfinite(table).all():
            raise ParameterError(f"{self.name}: {loaded.name} gives embeddings that are no numbers")
        names = [one.id for one in shown]
        found = []
        for item in items:
            place = names.index(item.what.shown.id)
            if item.kind == "picture to text":
                best = int(table[place].argmax())
                found.append(Outcome(float(best == place), shown[best].caption))
            else:
                best = int(table[:, place].argmax())
                found.append(Outcome(float(best == place), names[best]))
        return found


@lru_cache(maxsize=64)
def _gallery(which: int, seed: str) -> list[Shown]:
    return gallery(which, seed)


@lru_cache(maxsize=4096)
def drawn(picture: Captioned) -> Image.Image:
    """A picture, drawn once."""
    return picture.draw()
