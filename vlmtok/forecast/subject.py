"""What an estimate is of: a model as counts and widths, and what its processor makes of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters import adapter_for
from ..core.model_shape import ModelShape
from ..core.sight import Sight
from ..errors import ParameterError
from ..loading.models import Loaded, configured, skeleton
from ..loading.names import SHIPPED
from ..loading.processors import Reader, reader
from .presets import PRESETS, preset
from .published import PUBLISHED

Sizes = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class Subject:
    """A model that is not there.

    Attributes:
        shape: as counts and widths.
        model: gives the module, without data or with, or None where there is none.
        read: gives its processor, or None where nothing tells which.
        missing: what is missing then.
        size: width and height of a picture where nothing is said, or None for the tower's configured size.
    """

    shape: ModelShape
    model: Callable[[], Any] | None = None
    read: Callable[[], Reader] | None = None
    missing: str = ""
    size: tuple[int, int] | None = None
    _known: dict[tuple[Sizes, int | None], Sight] = field(default_factory=dict, repr=False)

    def sight(self, sizes: Sizes, frames: int | None) -> Sight:
        """What a prompt with blank pictures of these sizes becomes, by the host's own rule.

        Args:
            sizes: width and height of each, in pixels.
            frames: of each, where they are clips.

        Raises:
            ParameterError: nothing tells how the model's pictures are prepared, or it takes no clips.
            LoadError: its processor takes none of this size.
        """
        if (sizes, frames) not in self._known:
            if self.read is None or self.model is None:
                raise ParameterError(f"image_size: {self.missing}")
            source = self.read()
            made, between = source.pictures(sizes) if frames is None else source.clips(sizes, frames)
            try:
                found = adapter_for(self.model()).preview(made, between)
            except NotImplementedError:
                raise ParameterError(
                    f"image_size is for vision-language models; {self.shape.name} is a tower: its processor gives "
                    "every picture one size, and visual_tokens= takes patches"
                ) from None
            self._known[sizes, frames] = found
        return self._known[sizes, frames]


def subject_of(model: Any, processor: Any = None) -> Subject:
    """What can be given to `estimate`, as a subject.

    Args:
        model: as there.
        processor: of the model, where it is given without one.

    Raises:
        ParameterError: nothing that can be counted.
        UnsupportedModel: no adapter carries it.
        LoadError: the name's configuration cannot be had.
    """
    if isinstance(model, Subject):
        return model
    found = _subject(model)
    if processor is not None:
        if not hasattr(processor, "image_processor"):
            raise ParameterError(
                f"estimate: processor={type(processor).__name__} lays out no prompts; give the model's processor, "
                "which has an image_processor and a tokenizer"
            )
        found.read = lambda: Reader(found.shape.name, processor)
    return found


def _subject(model: Any) -> Subject:
    if isinstance(model, ModelShape):
        return Subject(model, missing=f"{model.name} is a shape alone, without a processor")
    if isinstance(model, Loaded):
        given = model
        if given.language:
            return Subject(_account(given.model), lambda: given.model, lambda: Reader(given.name, given.processor))
        return Subject(_account(given.model), missing=_tower(given.name))
    if isinstance(model, torch.nn.Module):
        return Subject(_account(model), lambda: model, missing=_unread("a model alone"))
    if isinstance(model, str):
        if model in PRESETS or not (":" in model or "/" in model or model in SHIPPED or os.path.isdir(model)):
            return _published(model)
        bare = skeleton(model)
        if not bare.language:
            return Subject(_account(bare.model), missing=_tower(model))
        return Subject(_account(bare.model), lambda: bare.model, lambda: reader(model, bare.model.config))
    if isinstance(model, Mapping) or hasattr(model, "model_type"):
        made = configured(model)
        return Subject(_account(made), lambda: made, missing=_unread("a configuration"))
    raise ParameterError(
        f"estimate() takes a preset, a model, a transformers configuration or its dict, got {type(model).__name__}; "
        f"presets: {', '.join(PRESETS)}"
    )


def _published(name: str) -> Subject:
    """The subject of a preset."""
    shape, row = preset(name), PUBLISHED.get(name)
    if row is None:
        return Subject(shape, missing=_tower(name))
    return Subject(shape, row.model, row.reader, size=row.size)


def _tower(name: str) -> str:
    return (
        f"{name} is a tower, and this is for vision-language models: every picture gets the tower's configured size; "
        "visual_tokens= takes patches"
    )


def _unread(what: str) -> str:
    return (
        f"{what} does not say how pictures are prepared; give processor=, or a folder or name with its "
        "preprocessor_config.json, or a preset, or else visual_tokens= and crops="
    )


def _account(model: Any) -> ModelShape:
    adapter = adapter_for(model)
    try:
        found: ModelShape = adapter.account()
    except NotImplementedError:
        raise ParameterError(f"adapter {adapter.name!r} does not say what its models cost") from None
    return found
