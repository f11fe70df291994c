"""Tells faults of vlmtok from those of hosts, of callers' code and of the machine, and names them as such.

What a hook or an entry point raises on purpose is a `VlmtokError`. Anything else that starts in code of this package is
a fault of ours and becomes `InternalError`; what starts in the host, in a user's method or signal passes unchanged.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import ParamSpec, TypeVar

import torch

from .errors import InternalError, VlmtokError

P = ParamSpec("P")
R = TypeVar("R")

_OWN = __name__.partition(".")[0]
_TOOLS = (
    frozenset({"torch", "torchvision", "numpy", "PIL", "triton", "typer", "click", "rich"}) | sys.stdlib_module_names
)
"""Libraries that only do what their caller says: an error that starts in one of them is the caller's."""
_MACHINE = (MemoryError, RecursionError, torch.OutOfMemoryError, torch.AcceleratorError)


def told(problem: Exception) -> InternalError | None:
    """What to raise instead of an exception that came up in code of this package.

    Args:
        problem: as it was caught; its traceback begins where it was caught.

    Returns:
        The error of ours, or None where the exception is somebody else's, or is meant.
    """
    if isinstance(problem, (VlmtokError, Warning, *_MACHINE)) or _of_torchs_own(problem):
        return None
    place = None
    for frame, line in _behind(problem.__traceback__):
        package = _package(frame)
        if package == _OWN:
            place = f"{frame.f_globals['__name__']}:{line}"
        elif package not in _TOOLS:
            return None
    return None if place is None else InternalError(type(problem).__name__, str(problem), place)


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """An entry point that raises no exception of its own but those that are meant."""

    @functools.wraps(function)
    def entrance(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as problem:
            fault = told(problem)
            if fault is None:
                raise
            raise fault from problem

    return entrance


def _behind(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Frames between the one that caught an exception and the one that raised it, with their lines."""
    step = None if traceback is None else traceback.tb_next
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _of_torchs_own(problem: Exception) -> bool:
    """Whether it is of a kind that torch's Python code makes: a tracer that cannot follow, a checkpoint that stops."""
    kinds = (kind.__module__ for kind in type(problem).__mro__)
    return any(name.startswith("torch.") and not name.startswith("torch._C") for name in kinds)
