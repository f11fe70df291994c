"""One picture, one prompt, one method: the bare model's answer beside the compressed model's.

This is what ``vlmtok run`` does, for notebooks too:

    model = vlmtok.load()                                   # the checkpoint that ships with the package
    result = vlmtok.compare(model, "cat.jpg", "what is this?", "todre:keep=0.1")
    print(result.compressed.text, result.report); result.overlay.save("overlay.png")
"""

from __future__ import annotations

import os
from typing import Any, overload

from PIL import Image
from torch import nn

from ..adapters import adapter_for
from ..core.method import Method
from ..errors import ParameterError
from ..guard import guarded
from ..loading.models import Loaded
from ..timing import Progress
from .comparing import Comparing
from .comparison import Comparison
from .sweep import Sweep, sweep

DEFAULT_METHOD = "todre:keep=0.1"
"""For models that answer in words."""
DEFAULT_TOWER_METHOD = "pitome:ratio=0.9"
"""For towers."""


Picture = Image.Image | str | os.PathLike[str]
_One = Method | str | list[Method | str] | tuple[Method | str, ...]
Several = list[_One] | tuple[_One, ...]


@overload
def compare(
    model: Loaded,
    image: Picture,
    prompt: str | None = None,
    method: str | Method | None = None,
    *,
    max_new_tokens: int = 32,
    rounds: int = 5,
    limit: float = 10.0,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Comparison: ...


@overload
def compare(
    model: Loaded,
    image: Picture,
    prompt: str | None = None,
    *,
    method: Several,
    max_new_tokens: int = 32,
    rounds: int = 5,
    limit: float = 10.0,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Sweep: ...


@overload
def compare(
    model: Loaded,
    image: Picture,
    prompt: Several,
    *,
    max_new_tokens: int = 32,
    rounds: int = 5,
    limit: float = 10.0,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Sweep: ...


@guarded
def compare(
    model: Loaded,
    image: Picture,
    prompt: str | Several | None = None,
    method: str | Method | Several | None = None,
    *,
    max_new_tokens: int = 32,
    rounds: int = 5,
    limit: float = 10.0,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Comparison | Sweep:
    """Runs a model bare and compressed on one picture. The model is bare again afterwards.

    Args:
        model: from `load`.
        image: a PIL picture or the path of one.
        prompt: what to ask; through the processor's chat template, unless it holds the processor's own image marks.
            Towers take none. A list in its place is taken for the methods, and the prompt is the default one.
        method: a method or spec string (``"todre+fastv:keep=0.5"`` are two at once); by default what `default_method`
            says. The items of a list are compared one after the other, as `vlmtok.sweep` does.
        max_new_tokens: of the answer, which is greedy.
        rounds: rounds of the measurement of latency.
        limit: seconds after which no further round begins.
        adapter: as for `vlmtok.compress`.
        progress: told what is being done.

    Returns:
        Both answers, and what was saved; of a list, a row for each method.

    Raises:
        LoadError: the picture cannot be read, or the bare model cannot answer it.
        ParameterError: the prompt does not fit.
        VlmtokError: the methods do not fit the model, see `vlmtok.compress`.
    """
    if prompt is not None and not isinstance(prompt, str):
        if method is not None:
            raise ParameterError(f"the prompt is one text, and {prompt!r} is {type(prompt).__name__}")
        prompt, method = None, prompt
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "adapter": adapter, "progress": progress}
    if isinstance(method, (list, tuple)):
        return sweep(model, image, method, prompt, rounds=rounds, limit=limit, **how)
    comparing = Comparing(model, image, prompt, **how)
    methods = default_method(model.model, adapter) if method is None else method
    return comparing.with_method(methods, rounds=rounds, limit=limit)


@guarded
def default_method(model: nn.Module, adapter: str | None = None) -> str:
    """A method that fits a model: `DEFAULT_METHOD` where a language model can be cut, else `DEFAULT_TOWER_METHOD`.

    Args:
        model: with or without data.
        adapter: as for `vlmtok.compress`.

    Raises:
        UnsupportedModel: no adapter carries it.
    """
    stages = adapter_for(model, adapter).layout().stages
    return DEFAULT_METHOD if "decoder" in stages else DEFAULT_TOWER_METHOD
