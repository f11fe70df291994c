"""Which ways a model takes, tried without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters import adapter_for
from ..core.model_shape import ModelShape
from ..core.spec import as_methods
from ..errors import TargetError, VlmtokError
from ..forecast.budget import budget
from ..forecast.estimate import attach
from ..forecast.presets import PRESETS
from ..forecast.subject import subject_of
from ..lab.pairs import pair
from ..loading.models import Loaded, skeleton
from ..loading.names import EMBEDDED
from .sizing import why_fixed
from .twins import why_one_size
from .ways import WITHIN, budget_quantity

Tried = tuple[tuple[str, ...], tuple[str, ...], str]
"""Stages at which a way acts, what it chooses by itself, and why it is refused: empty where it is not."""


@dataclass(frozen=True)
class Target:
    """A model that something is looked for.

    Attributes:
        name: as typed, or its class.
        shape: as counts and widths.
        module: without data or with, or None for presets of which nothing else is known.
        language: whether it answers in words.
        visual: visual tokens of a picture, of a tower its patches; 0 where that depends on the picture.
        adapter: as for `vlmtok.compress`.
    """

    name: str
    shape: ModelShape
    module: nn.Module | None
    language: bool
    visual: int
    adapter: str | None = None

    def tries(self, method: str, spec: str) -> Tried:
        """A way on this model.

        Args:
            method: its name; ``downsample`` is one.
            spec: with its settings.
        """
        if method == "downsample":
            return (), (), self._downsampled()
        try:
            made = as_methods(spec)
            if self.module is not None and len(made) == 1:
                found = pair(self.module, self.shape.layout, made[0], self.name, self.adapter)
                return found.stages, found.notes, found.reason
            carried = attach(self.shape, spec)
        except VlmtokError as refusal:
            return (), (), " ".join(str(refusal).split())
        return tuple(dict.fromkeys(one.site.stage for one in carried.entries)), tuple(carried.said), ""

    def fits(self, asked: str, share: float) -> tuple[str, str]:
        """A method set to a budget on this model: its spec string, and why it cannot be; empty what is not known.

        Args:
            asked: spec string from which to start.
            share: of the visual tokens, mean over layers; of the caches' bytes for methods that act there alone.
        """
        try:
            made = as_methods(asked)
            what = budget_quantity(made, self.shape.layout)
            return str(budget(asked, self.shape, within=WITHIN, **{what: share})), ""  # type: ignore[arg-type]
        except TargetError as problem:
            return "", " ".join(str(problem).split())
        except VlmtokError:  # nothing to move, a stack, or a model that does not say how many tokens a picture has
            return "", ""

    def _downsampled(self) -> str:
        """Why pictures cannot be made smaller, as far as that shows without a processor."""
        if self.module is None:
            return ""
        ask: Callable[[Any], str] = why_fixed if self.language else why_one_size
        return ask(self.module)


def target_of(model: Any, adapter: str | None = None) -> Target:
    """A model as `recommend` takes it.

    Args:
        model: as for `vlmtok.estimate`; None for the shipped checkpoint.
        adapter: as for `vlmtok.compress`.

    Raises:
        UnsupportedModel: no adapter carries it.
        LoadError: the name's configuration cannot be had.
        ParameterError: nothing that can be counted.
    """
    if model is None:
        model = EMBEDDED
    subject = subject_of(model) if adapter is None else None
    module = _module(model, subject)
    if subject is None:
        assert module is not None  # without a subject it is a model
        carrier = adapter_for(module, adapter)
        shape = carrier.account()
    else:
        shape = subject.shape
    name = model if isinstance(model, str) else getattr(model, "name", None) or type(module).__name__
    language = shape.language is not None or _answers(module)
    visual = shape.visual
    if not language and shape.vision is not None:
        visual = shape.vision.tokens - shape.vision.protected
    return Target(str(name), shape, module, language, visual, adapter)


def _answers(module: Any) -> bool:
    """Whether a model of transformers speaks, whose language model is not cut and so not in its shape."""
    return hasattr(module, "config") and callable(getattr(module, "generate", None))


def _module(model: Any, subject: Any) -> nn.Module | None:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Loaded):
        return model.model
    if subject is not None and subject.model is not None:
        found: nn.Module = subject.model()
        return found
    if isinstance(model, str) and model not in PRESETS:
        return skeleton(model).model
    return None
