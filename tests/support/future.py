"""Plays a host library of another day: the same model, whose parts call things by other names or in other forms.

A part gets a subclass of its class. Its callers go on as they do today; `play` turns their call into the one that the
future caller would make before any hook sees it, and turns it back inside `forward`. What comes out goes the same way.
So the bare model computes what it always did, and only what hooks see differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Box:
    """An object of a kind that nobody knows."""

    value: Any


def play(
    module: nn.Module,
    rename: Mapping[str, str] = {},
    order: Callable[[list[str]], list[str]] | None = None,
    hidden: Mapping[str, str] = {},
    drop: tuple[str, ...] = (),
    box: Mapping[str, str] = {},
    give: Callable[[Any], Any] | None = None,
    take: Callable[[Any], Any] | None = None,
) -> None:
    """Changes a module of a model in place.

    Args:
        module: the part.
        rename: arguments that are called otherwise, in the signature too.
        order: if given, callers pass everything by position, in this order of names.
        hidden: arguments that callers pass otherwise while the signature still has the old name.
        drop: arguments that callers no longer pass; `forward` gets None.
        box: arguments that come inside an object, under this name.
        give: from what `forward` gives to what callers and hooks see, and
        take: back, for the callers of today.
    """
    kind = type(module)
    plain = inspect.signature(kind.forward)
    names = [name for name, p in plain.parameters.items() if name != "self" and p.kind != p.VAR_KEYWORD]
    new = {**{name: rename.get(name, name) for name in names}, **hidden}
    moved = order(list(names)) if order is not None else None
    signature_of_future = _signature(plain, {**rename, **{old: box[old] for old in box}}, moved, drop)

    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        for name in drop:
            given.pop(name, None)
        for old, name in box.items():
            if old in given:
                given[name] = Box(given.pop(old))
        if moved is not None:
            at = [given.pop(name, plain.parameters[name].default) for name in moved]
            result = kind.__call__(self, *at, **given)
        else:
            result = kind.__call__(self, **{new.get(name, name): value for name, value in given.items()})
        return result if take is None else take(result)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(moved or names, args)), **kwargs}
        back = {name: old for old, name in new.items()}
        given = {back.get(name, name): value for name, value in given.items()}
        for old, name in box.items():
            if name in given:
                given[old] = given.pop(name).value
        result = kind.forward(self, **given)
        return result if give is None else give(result)

    forward.__signature__ = signature_of_future
    forward.__wrapped__ = kind.forward  # it computes what its class computes, as a decorator of the host would
    module.__class__ = type(
        kind.__name__, (kind,), {"__call__": outer, "forward": forward, "__module__": kind.__module__}
    )


def _signature(
    plain: inspect.Signature, rename: Mapping[str, str], order: list[str] | None, drop: tuple[str, ...]
) -> inspect.Signature:
    parameters = [p for name, p in plain.parameters.items() if name not in drop]
    if order is not None:
        by_name = {p.name: p for p in parameters}
        rest = [p for p in parameters if p.name not in order and p.name != "self"]
        parameters = [by_name["self"], *(by_name[name] for name in order), *rest]
    renamed = [p.replace(name=rename.get(p.name, p.name)) for p in parameters]
    first = [p for p in renamed if p.kind != p.VAR_KEYWORD]
    loose = any(p.default is not p.empty for p in first[1:])
    if loose:  # names without defaults may follow those with one when their order changed
        first = [first[0], *(p if p.default is not p.empty else p.replace(default=None) for p in first[1:])]
    return plain.replace(parameters=[*first, *(p for p in renamed if p.kind == p.VAR_KEYWORD)])


def other_field(old: str, new: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """An output object whose field has another name, and the way back."""
    from transformers.utils import ModelOutput

    kept: list[Any] = []

    def give(output: Any) -> Any:
        kept.append(type(output))
        return ModelOutput({new if name == old else name: value for name, value in output.items()})

    def take(output: Any) -> Any:
        return kept.pop()(**{old if name == new else name: value for name, value in output.items()})

    return give, take


def wrapped(how: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> tuple[Callable, Callable]:
    """Hidden states inside something, and the way back."""
    return how, unwrap


def in_tuple(x: Any) -> Any:
    return (x, None)


def in_dict(x: Any) -> Any:
    from transformers.utils import ModelOutput

    return ModelOutput(hidden_states=x)


def in_box(x: Any) -> Any:
    return Box(x)


def last_tensor(x: Any) -> Any:
    """Hidden states behind something else of another shape."""
    return (torch.zeros(1), x)
