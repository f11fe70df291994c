"""What hosts call things, told from signatures and types: tests name them for no version."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
"""Names that an argument for the cache has or had in transformers."""


def cache_of(output: Any) -> Any:
    """The cache among the fields of an output, whatever its name.

    Args:
        output: of a model or of `generate`.

    Raises:
        AssertionError: it holds none, or more than one.
    """
    found = [value for value in output.values() if isinstance(value, transformers.Cache)]
    assert len(found) == 1, f"{len(found)} caches among {', '.join(output)}"
    return found[0]


def caches_in(values: Mapping[str, Any]) -> list[str]:
    """Under which names arguments hold a cache."""
    return [name for name, value in values.items() if isinstance(value, transformers.Cache)]


def cache_name(function: Callable[..., Any]) -> str:
    """What a function or forward calls the cache that it takes.

    Raises:
        AssertionError: it takes none by any of its names, or by more than one.
    """
    found = [name for name in CACHE_NAMES if name in inspect.signature(function).parameters]
    assert len(found) == 1, f"{function.__qualname__} takes a cache as {found or 'nothing that has a known name'}"
    return found[0]


def named_by_host(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a forward that was written with `cache` take it under the name that the installed transformers uses."""
    name = cache_name(CausalLMOutputWithPast)
    signature = inspect.signature(forward)
    parameters = [p.replace(name=name) if p.name == "cache" else p for p in signature.parameters.values()]

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            kwargs["cache"] = kwargs.pop(name)
        return forward(*args, **kwargs)

    renamed.__signature__ = signature.replace(parameters=parameters)
    return renamed


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as an argument of a model or of its `generate`.

    A forward that names none hands it to that of the class below.
    """
    forwards = [kind.__dict__["forward"] for kind in type(model).__mro__ if "forward" in kind.__dict__]
    named = next(forward for forward in forwards if set(CACHE_NAMES) & set(inspect.signature(forward).parameters))
    return {cache_name(named): cache}


def checkpoint(model: nn.Module, reentrant: bool = False) -> None:
    """Turns on checkpointing of a model of transformers, whose method had another name before 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
