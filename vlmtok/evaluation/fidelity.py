"""Task `fidelity`: how far a model stays with its uncompressed self on anybody's pictures, which need no labels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..errors import ParameterError, VlmtokWarning
from ..lab.prompts import DEFAULT_PROMPT, NO_PROMPT
from ..lab.runners import Loyalty
from ..loading.models import Loaded, encoder_of
from ..loading.names import EMBEDDED, SHIPPED
from ..loading.pictures import samples
from .gallery import Gallery, gallery, picture
from .task import Item, Outcome
from .twins import twin
from .witness import Witness, hear, loyalty

MAX_NEW_TOKENS = 16

KEPT_BYTES = 2**30
"""What uncompressed answers with their distributions may take; those beyond are asked for again each time."""


@dataclass(frozen=True)
class _Shown:
    """What an item asks with: a picture, and a question that belongs to it or None."""

    path: Path
    question: str | None


class Fidelity:
    """Any supported model on a folder of pictures, against itself without compression.

    A vision-language model answers one prompt about each picture, greedily. The other way then says the same tokens,
    one a step, and is compared at each: quality is whether it would have said them of itself, so whether the answers
    agree. Of a tower quality is whether its best class stays, or its embedding with a cosine of at least 0.99.
    Measures, means over pictures: ``kl`` of the next token's distribution (mean over places) or that of the classes, in
    nats; ``top1``, the share of places with the same best token, or whether the best class is the same; ``cosine`` of
    what enters the head, or of the tower's output.

    Args:
        images: a folder with pictures, looked through with the folders in it; files that are none are named in a
            warning and left out. None takes the pictures that ship with the package, each with its own question.
        prompt: asked of every picture; None asks for a description, or the question that belongs to the picture.
        max_new_tokens: of an answer at most.
    """

    name = "fidelity"
    about = "answers, distributions and features against the uncompressed model, on any pictures, without labels"
    model = EMBEDDED
    language = True

    def __init__(
        self,
        images: str | os.PathLike[str] | None = None,
        prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ParameterError(f"fidelity: max_new_tokens={max_new_tokens!r} is not possible; at least 1")
        if prompt is not None and not prompt.strip():
            raise ParameterError("fidelity: the prompt is empty")
        self.images = None if images is None else Path(images)
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        given = {"images": None if images is None else str(Path(images).resolve()), "prompt": prompt}
        self.settings = {name: value for name, value in given.items() if value is not None}
        if max_new_tokens != MAX_NEW_TOKENS:
            self.settings["max_new_tokens"] = str(max_new_tokens)
        self.gallery: Gallery | None = None
        self._bare: Loaded | None = None
        self._heard: dict[str, Witness] = {}
        self._bytes = 0

    def items(self, limit: int | None) -> Sequence[Item]:
        """The pictures by their names; a warning names the files that are none.

        Raises:
            LoadError: no such folder, or no picture in it.
        """
        if self.images is None:
            return [Item(one.path.name, "picture", _Shown(one.path, one.question)) for one in samples()[:limit]]
        self.gallery = gallery(self.images, limit)
        if self.gallery.skipped:
            said = "; ".join(self.gallery.notes())
            warnings.warn(f"fidelity: {said}", VlmtokWarning, stacklevel=2)
        return [Item(self.gallery.name(path), "picture", _Shown(path, None)) for path in self.gallery.paths]

    def check(self, loaded: Loaded) -> None:
        """Keeps a twin of the model, which stays uncompressed; refuses a prompt for a tower.

        Raises:
            ParameterError: a tower and a prompt, or a model that carries a compression.
        """
        if self.prompt is not None and not loaded.language:
            raise ParameterError(NO_PROMPT.format(loaded.name))
        made = twin(loaded.model)
        self._bare = replace(loaded, model=made, encode=None if loaded.language else encoder_of(made))
        self._heard, self._bytes, self.language = {}, 0, loaded.language

    def batches(self, loaded: Loaded, items: Sequence[Item], size: int) -> list[list[int]]:
        """One picture at a time: they differ in size, and answers in length."""
        return [[place] for place in range(len(items))]

    def pictures(self, item: Item) -> list[Image.Image]:
        """The picture."""
        return [picture(item.what.path)]

    def answer(self, loaded: Loaded, items: Sequence[Item]) -> list[Outcome]:
        """How far the model stays with its uncompressed self on each picture."""
        return [self._outcome(loaded, item) for item in items]

    def probe(self, loaded: Loaded, item: Item) -> None:
        """The first token, or a tower's forward."""
        (shown,) = self.pictures(item)
        hear(loaded, shown, self._asked(loaded, item), 1)

    # ------------------------------------------------------------------ one picture
    def _outcome(self, loaded: Loaded, item: Item) -> Outcome:
        (shown,), asked = self.pictures(item), self._asked(loaded, item)
        bare = self._reference(item, shown, asked)
        short = hear(loaded, shown, asked, self.max_new_tokens, bare)
        found = loyalty(loaded, bare, short)
        return Outcome(float(found.same), short.answer.text, _measures(found, bool(bare.answer.classes)))

    def _asked(self, loaded: Loaded, item: Item) -> str | None:
        if not loaded.language:
            return None
        if self.prompt is not None:
            return self.prompt
        if item.what.question is not None:
            return str(item.what.question)
        # The checkpoints that ship know the words of their own questions and no others.
        return samples()[0].question if loaded.name in SHIPPED else DEFAULT_PROMPT

    def _reference(self, item: Item, shown: Image.Image, asked: str | None) -> Witness:
        """What the uncompressed model says."""
        if item.id in self._heard:
            return self._heard[item.id]
        if self._bare is None:
            raise ParameterError("fidelity: check(model) comes first; it keeps the uncompressed model")
        found = hear(self._bare, shown, asked, self.max_new_tokens)
        tensors = (found.logits, found.features, found.answer.output)
        size = sum(one.numel() * one.element_size() for one in tensors)
        if self._bytes + size <= KEPT_BYTES:
            self._heard[item.id] = found
            self._bytes += size
        return found


def _measures(found: Loyalty, classes: bool) -> dict[str, float]:
    """Figures besides the quality, those that the model has."""
    top = float(found.same) if found.tokens is None and classes else found.tokens
    given = {"kl": found.divergence, "top1": top, "cosine": found.cosine}
    return {name: value for name, value in given.items() if value is not None}
