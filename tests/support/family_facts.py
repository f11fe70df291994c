"""Families that were asked once in each way, with hooks of torch alone looking on, and facts about them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from families.build import FAMILIES, TOWER_ONLY, shared
from torch import nn
from vlmtok.adapters.base import child
from vlmtok.adapters.hosts import Role
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.masks import RECURRENT, layer_kinds
from vlmtok.adapters.language.spec import VLMSpec

from .hosts_of import cache_of

TINY = {**FAMILIES, **TOWER_ONLY}


@dataclass
class Call:
    """One call of a module: what it got, by position and by name, and what it gave."""

    of: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bound: dict[str, Any]
    output: Any = None


@dataclass
class Host:
    """A family's model, its row, and the calls of its parts in the order in which they began."""

    name: str
    spec: VLMSpec
    model: nn.Module
    core: nn.Module
    lm: nn.Module | None
    prompts: tuple[Any, ...]
    generated: list[Call] = field(default_factory=list)
    forward: list[Call] = field(default_factory=list)
    cache: Any = None
    output: Any = None

    @property
    def config(self) -> Any:
        return self.core.config

    @property
    def text(self) -> Any:
        return self.lm.config

    @property
    def kinds(self) -> list[str]:
        return layer_kinds(self.text, len(self.lm.layers))

    def attentions(self) -> list[nn.Module]:
        return [layer.self_attn for layer, kind in zip(self.lm.layers, self.kinds) if kind not in RECURRENT]


def first(calls: list[Call], of: str) -> Call:
    return next(call for call in calls if call.of == of)


def given(values: dict[str, Any], role: Role) -> Any:
    """What a call has under one of a role's names, or None."""
    return next((values[name] for name in role.names if name in values), None)


def order(calls: list[Call], *names: str) -> bool:
    """Whether the first calls of some parts began in this order."""
    begun = [call.of for call in calls]
    return all(name in begun for name in names) and sorted(names, key=begun.index) == list(names)


@functools.cache
def host(name: str) -> Host:
    """A family that has been asked once in each way."""
    family, model = TINY[name], shared(name, TINY[name].attentions[0])
    spec = ROWS[model.config.model_type]
    core = child(model, spec.core)
    rows = family.batch(*family.rows)
    found = Host(name, spec, model, core, None if spec.boundary else child(core, spec.lm), rows.prompts)
    parts = {"top": model} if core is not model else {}
    parts |= {"core": core, "tower": child(core, spec.tower)}
    if spec.projector:
        parts["projector"] = child(core, spec.projector)
    if found.lm is not None:
        parts |= {"text": found.lm, **{f"layer {i}": layer for i, layer in enumerate(found.lm.layers)}}
    calls: list[Call] = []
    hooks = []
    for of, module in parts.items():
        hooks += _watch(of, module, calls)
    try:
        with torch.no_grad():
            out = model.generate(**rows.inputs(), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
            found.generated, found.cache = list(calls), cache_of(out)
            calls.clear()
            found.output = model(**rows.inputs())
            found.forward = list(calls)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _watch(of: str, module: nn.Module, calls: list[Call]) -> list[Any]:
    signature, open_calls = inspect.signature(type(module).forward), []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        calls.append(Call(of, args, dict(kwargs), {**bound, **bound.get("kwargs", {})}))
        open_calls.append(calls[-1])

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        open_calls.pop().output = output

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


@dataclass(frozen=True)
class Fact:
    """A sentence about a host, in which ``{spec...}`` is filled in from the row.

    Attributes:
        sentence: what must hold.
        concerns: the rows that lean on it.
        holds: whether it does.
    """

    sentence: str
    concerns: Callable[[VLMSpec], bool]
    holds: Callable[[Host], bool]
