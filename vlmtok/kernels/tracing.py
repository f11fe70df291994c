"""What torch.compile and torch.jit.trace are told; Dynamo is not imported for it, which takes a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])


def constant_in_graphs(function: F) -> F:
    """Marks a function whose result a compiled or traced graph may take as a constant.

    Args:
        function: depends on nothing but its arguments.

    Returns:
        The function, with the mark that `torch.compiler.assume_constant_result` sets. Under `torch.jit.trace`, where
        lengths are tensors, it gets them as numbers and is not recorded.
    """

    @functools.wraps(function)
    def constant(*args: Any) -> object:
        state = torch._C._get_tracing_state()
        if state is None:
            return function(*args)
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return function(*(int(arg) if isinstance(arg, Tensor) else arg for arg in args))
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return cast(F, constant)
