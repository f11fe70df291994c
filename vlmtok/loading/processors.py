"""What prepares pictures for a model, without the model: run on blank pictures, it says what a size becomes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ParameterError
from .models import place_of
from .problems import LoadError, line_of, one_line_errors, quiet, taken_in
from .standins import MARKS, tokenizer

GREY = (110, 100, 90)


@dataclass(frozen=True, eq=False)
class Reader:
    """A processor and the model that it is for.

    Attributes:
        name: of the model, for messages.
        processor: of transformers.
    """

    name: str
    processor: Any

    def pictures(self, sizes: Sequence[tuple[int, int]]) -> tuple[dict[str, Any], int | None]:
        """What it makes of blank pictures in one prompt.

        Args:
            sizes: width and height of each, in pixels.

        Returns:
            Its output by the host's names, and the id of the token that stands between pictures.

        Raises:
            LoadError: it takes no such pictures.
        """
        from PIL import Image

        processor, end = self.processor, self._end(len(sizes))
        mark = mark_of(processor)
        text = f" {end[0]} ".join([mark] * len(sizes)) + " ."
        if getattr(processor, "num_query_tokens", None):  # BLIP's processors put the marks in themselves
            text = "."
        images = [Image.new("RGB", size, GREY) for size in sizes]
        made = taken_in(
            self.name, max(sizes), lambda: quietly(processor, images=[images], text=[text], return_tensors="pt")
        )
        return dict(made), end[1]

    def clips(self, sizes: Sequence[tuple[int, int]], frames: int) -> tuple[dict[str, Any], int | None]:
        """The same for blank clips.

        Args:
            sizes: width and height of each, in pixels.
            frames: of each; all are shown to the model.

        Raises:
            ParameterError: the processor takes no clips.
            LoadError: it takes none of this size.
        """
        import numpy

        processor, end = self.processor, self._end(len(sizes))
        mark = _name_of(getattr(processor, "video_token", None))
        if getattr(processor, "video_processor", None) is None or mark is None:
            raise ParameterError(
                f"frames: {self.name} takes pictures and no video: its {type(processor).__name__} has no part for clips"
            )
        text = f" {end[0]} ".join([mark] * len(sizes)) + " ."
        clips = [numpy.full((frames, high, wide, 3), GREY, dtype=numpy.uint8) for wide, high in sizes]
        made = taken_in(
            self.name,
            max(sizes),
            lambda: quietly(processor, videos=clips, text=[text], do_sample_frames=False, return_tensors="pt"),
            frames,
        )
        return dict(made), end[1]

    def _end(self, pictures: int) -> tuple[str, int | None]:
        """A mark that stands between so many pictures, and its id."""
        words: Any = getattr(self.processor, "tokenizer", None)
        mark = _name_of(getattr(words, "eos_token", None))
        if mark is not None:
            return mark, words.eos_token_id
        if pictures > 1:
            raise ParameterError(
                f"image_size: the tokenizer of {self.name} has no end of sequence, by which several pictures of a "
                "prompt could be told apart; give one size"
            )
        return ".", None


def quietly(processor: Any, **given: Any) -> Any:
    """Calls a processor without its log lines: blank pictures have no metadata, which hosts like to say."""
    with quiet():
        return processor(**given)


def mark_of(processor: Any, prompt: str = "") -> str:
    """The text that stands for a picture: the processor's, or ``<image>`` where the prompt says so."""
    names = ("image_placeholder_token", "image_token")  # one that is written, and one that it becomes
    found = next((mark for name in names if (mark := _name_of(getattr(processor, name, None)))), "<image>")
    return "<image>" if found not in prompt and "<image>" in prompt else found


def _name_of(mark: Any) -> str | None:
    return mark if isinstance(mark, str) else getattr(mark, "content", None)


# ---------------------------------------------------------------------- where processors come from
def reader(name: str | None, config: Any) -> Reader:
    """The processor of a checkpoint; a folder may lack its tokenizer.

    Args:
        name: as in `load`.
        config: of the model.

    Raises:
        LoadError: there is none; the message says what is missing.
    """
    import transformers

    shown, place = place_of(name)
    local, problem = os.path.isdir(place), None
    with quiet():
        # Where a tokenizer's files are missing, transformers makes some of them empty and says nothing.
        if not local or any(word in file for file in os.listdir(place) for word in ("token", "vocab", "piece")):
            try:
                found = transformers.AutoProcessor.from_pretrained(place)
                if hasattr(found, "image_processor"):  # else it is what transformers gives where a part is missing
                    return Reader(shown, found)
            except Exception as raised:
                problem = raised
        if not local:
            why = "it has no image processor" if problem is None else line_of(problem)
            raise LoadError(f"cannot load the processor of {shown!r}: {why}") from problem
        return _without_words(shown, place, config, problem)


def _without_words(shown: str, place: str, config: Any, problem: Exception | None) -> Reader:
    """The processor of a folder that holds no tokenizer."""
    import transformers

    stored = {name: _stored(place, name) for name in ("processor_config.json", "preprocessor_config.json")}
    if not any(stored.values()):
        raise LoadError(
            f"folder {shown!r} does not say how pictures are prepared: it has neither preprocessor_config.json nor "
            "processor_config.json; add the file, or give processor=, or visual_tokens= and crops="
        ) from problem
    options, older = stored.values()
    mapping = transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES
    kind = options.get("processor_class") or older.get("processor_class") or mapping.get(config.model_type)
    pictures = one_line_errors(shown, lambda: transformers.AutoImageProcessor.from_pretrained(place))
    clips = None
    if MARKS.get(str(kind)) is not None and MARKS[str(kind)].video is not None:
        clips = one_line_errors(shown, lambda: transformers.AutoVideoProcessor.from_pretrained(place))
    parts = ("image_processor", "video_processor", "feature_extractor", "processor_class", "chat_template")
    rest = {name: value for name, value in options.items() if name not in parts}
    return assembled(shown, str(kind), pictures, clips, rest, config)


def _stored(place: str, name: str) -> dict[str, Any]:
    path = os.path.join(place, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def published(name: str, facts: Mapping[str, Any], config: Any) -> Reader:
    """The processor of a published model, from its settings.

    Args:
        name: of the model.
        facts: ``processor`` (its class), ``pictures`` and ``clips`` (settings with ``kind``, the class of each), and
            ``options`` of the processor.
        config: of the model.
    """
    import transformers

    def made(settings: Mapping[str, Any] | None) -> Any:
        if settings is None:
            return None
        rest = {key: value for key, value in settings.items() if key != "kind"}
        return getattr(transformers, settings["kind"])(**rest)

    with quiet():
        return assembled(
            name,
            facts["processor"],
            made(facts["pictures"]),
            made(facts.get("clips")),
            facts.get("options", {}),
            config,
        )


def assembled(name: str, kind: str, pictures: Any, clips: Any, options: Mapping[str, Any], config: Any) -> Reader:
    """A processor of these parts, with a tokenizer that knows the family's marks and no words.

    Raises:
        LoadError: no marks are known of such a processor, or it cannot be made.
    """
    import transformers

    if kind not in MARKS:
        raise LoadError(
            f"{name!r} holds no tokenizer, and a {kind} cannot lay out a prompt without it; add the tokenizer's files, "
            "or give processor=, or visual_tokens= and crops="
        )
    if kind == "SmolVLMProcessor" and not _spells_numbers():
        kind, clips = "Idefics3Processor", None  # whose pictures are the same; the other wants num2words for clips
    ids = [getattr(config, f"{what}_token_id", None) for what in ("image", "video")]
    words = tokenizer(MARKS[kind], getattr(config, "image_token_index", 0) if ids[0] is None else ids[0], ids[1])
    parts = {"image_processor": pictures, "tokenizer": words, **({} if clips is None else {"video_processor": clips})}
    made = one_line_errors(name, lambda: getattr(transformers, kind)(**parts, **options))
    return Reader(name, made)


def _spells_numbers() -> bool:
    import importlib.util

    return importlib.util.find_spec("num2words") is not None
