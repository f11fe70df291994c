"""Module hooks that go quiet when their attachment ends, and how they are found and taken away."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import PassError, UnsupportedModel
from ..guard import told


class Holder(Protocol):
    """What hooks know of the attachment that holds them."""

    active: bool
    owner: Any

    @property
    def live(self) -> bool:
        """Whether hooks are to run: false while paused, and for good behind its end."""


class NotScriptable(UnsupportedModel, AttributeError):
    """TorchScript compiles hooks from their source; ours have none. Who asks a hook for its name gets no name."""


class Hook:
    """A module hook that goes quiet when its attachment ends; a copy of it is inert from the start."""

    __slots__ = ("attachment", "call", "layer", "where")

    def __init__(
        self,
        attachment: Holder | None = None,
        call: Callable[..., Any] | None = None,
        layer: int = -1,
        where: nn.Module | None = None,
    ) -> None:
        self.attachment = attachment
        self.call = call
        self.layer = layer
        self.where = None if where is None else weakref.ref(where)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Passes on to the driver, unless paused or ended."""
        if self.attachment is None or self.call is None or not self.attachment.live:
            return None
        if torch.compiler.is_compiling():  # a tracer says by exceptions of its own what it cannot follow
            return self.call(self.layer, module, *given)
        try:
            return self.call(self.layer, module, *given)
        except Exception as problem:
            fault = told(problem)
            if fault is None:
                raise
            raise fault from problem

    @property
    def __name__(self) -> str:
        """Asked by ``torch.jit.script`` alone.

        Raises:
            NotScriptable: always.
        """
        raise NotScriptable(
            "torch.jit.script takes no Python hooks, and this model carries those of a compression, paused or not; end "
            "it first (run.remove() or vlmtok.remove(model)), or use torch.jit.trace, torch.export or torch.compile, "
            "which follow it"
        )

    def __deepcopy__(self, memo: dict[Any, Any]) -> Hook:
        module = None if self.where is None else self.where()
        twin = memo.get(id(module)) if module is not None else None
        if twin is not None:
            memo.setdefault(_Bare, _Bare()).modules.append(twin)
        return Hook()

    def __copy__(self) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return (Hook, ())


class _Bare:
    """Takes inert hooks out of modules that were copied, when the copying is over and its memo goes."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __del__(self) -> None:
        for module in self.modules:
            _clear(module)


_TABLES = ("_forward_pre_hooks", "_forward_hooks")

_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def _own(module: nn.Module) -> Iterator[tuple[str, int, Hook]]:
    """Hooks of ours on one module: (table, key, hook)."""
    for table in _TABLES:
        for key, hook in list(getattr(module, table, {}).items()):
            if isinstance(hook, Hook):
                yield table, key, hook


def _clear(module: nn.Module) -> None:
    """Takes inert hooks off one module."""
    for table, key, hook in _own(module):
        if hook.attachment is None or not hook.attachment.active:
            getattr(module, table).pop(key, None)
            for flags in _FLAGS:
                getattr(module, flags, {}).pop(key, None)


def hooks_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, int, Hook]]:
    """Every hook of ours in a model, inert ones included: (module, table, key, hook)."""
    for module in model.modules():
        for table, key, hook in _own(module):
            yield module, table, key, hook


def sweep(model: nn.Module) -> None:
    """Takes out inert hooks, which a model that was pickled carries."""
    for module in model.modules():
        _clear(module)


def replaying() -> bool:
    """Whether autograd is running this forward again (gradient checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def weak(module: nn.Module) -> Callable[[], Any]:
    """A reference that does not keep the module alive.

    Raises (when called):
        PassError: the module is gone.
    """
    reference = weakref.ref(module)

    def get() -> nn.Module:
        found = reference()
        if found is None:
            raise PassError("the compressed model no longer exists")
        return found

    return get
