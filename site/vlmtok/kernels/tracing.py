"""What torch.compile is told without importing Dynamo, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_in_graphs(function: F) -> F:
    """Marks a function whose result a compiled graph may take as a constant.

    Args:
        function: depends on nothing but its arguments.

    Returns:
        The function, with the mark that `torch.compiler.assume_constant_result` sets.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
