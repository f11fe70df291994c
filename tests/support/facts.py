"""Facts of host libraries, one sentence each, and what hooks of torch alone see of a model that runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LIBRARIES = {"timm": "timm", "open_clip": "open_clip", "HF": "transformers", "LLaVA": "transformers"}


class Facts:
    """Facts of one file: a decorator that takes a sentence, and the rows that it collects.

    Attributes:
        rows: parameters of a test: sentence, host, check.
    """

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def __call__(self, sentence: str, hosts: Iterable[str] = ("",)) -> Callable[..., Any]:
        """Registers a check under its sentence, once for every host; it returns whether the sentence holds."""

        def register(holds: Callable[..., bool]) -> Callable[..., bool]:
            names = {host: f"{host}: {sentence}" if host else sentence for host in hosts}
            self.rows.extend(pytest.param(sentence, host, holds, id=name) for host, name in names.items())
            return holds

        return register


def assert_holds(sentence: str, holds: Callable[..., bool], host: Any = None) -> None:
    """Fails with the sentence and the release in which it no longer holds, if it does not.

    Args:
        sentence: what is said.
        holds: whether it is so; asked of `host`, if there is one.
        host: what the sentence is about, with a `name`.
    """
    word = (host.name if host else sentence.partition(":")[0]).split()[0]
    library = sys.modules.get(LIBRARIES.get(word, word), torch)
    about = f" of {host.name}" if host else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = holds(host) if host else holds()
    assert found, f"no longer true{about} in {library.__name__} {library.__version__}: {sentence}"


@dataclass
class Call:
    """One call of a module: what it got, by position and by name, and what it gave."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


def calls_of(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], Any]:
    """Every call of a submodule in the order in which they began, and what `run` gave."""
    calls: list[Call] = []
    handles = []
    for path, module in model.named_modules():
        stack: list[Call] = []

        def before(module, args, kwargs, path=path, stack=stack):
            calls.append(Call(path, args, kwargs))
            stack.append(calls[-1])

        def after(module, args, kwargs, output, stack=stack):
            stack.pop().output = output

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        return calls, run()
    finally:
        for handle in handles:
            handle.remove()


def one(calls: list[Call], path: str) -> Call:
    """The only call of a module."""
    (found,) = [call for call in calls if call.path == path]
    return found


def begun(calls: list[Call], *paths: str) -> list[str]:
    """Those of some modules that were called, in order, repetitions too."""
    return [call.path for call in calls if call.path in paths]


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, atol=1e-5))
