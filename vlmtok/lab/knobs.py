"""What can be turned at a method on a model: read off its fields, asked of its own checks, nothing written down."""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.method import Method
from ..core.registry import create_method, list_methods
from ..core.settings import format_value
from ..core.site import Layout
from ..errors import ParameterError, VlmtokError
from .catalogue import argument_docs, refusal

STEP = 0.01
"""Of shares."""
WIDE = 4
"""Counts go up to the depth of the model, or to so many times the value from which one starts."""


@dataclass(frozen=True)
class Knob:
    """A setting that can be turned.

    Attributes:
        name: of the field.
        kind: ``share`` (a float), ``count`` (an int: of tokens, of layers, or a layer), ``switch``, ``choice``, or
            ``typed``: anything else, written as in a spec string.
        value: where it stands.
        values: what the method takes, ascending, or its choices; empty for ``switch`` and ``typed``.
        optional: whether None is possible too.
        place: of a tuple's item; None for the whole.
        strength: whether it is the parameter that `vlmtok.budget` moves.
        what: from the docstring.
    """

    name: str
    kind: str
    value: Any
    values: tuple[Any, ...] = ()
    optional: bool = False
    place: int | None = None
    strength: bool = False
    what: str = ""

    @property
    def key(self) -> str:
        """The name, with the place of an item: ``ratios[0]``."""
        return self.name if self.place is None else f"{self.name}[{self.place}]"


def admitted(layout: Layout) -> list[str]:
    """Names of the methods that run on a model with their defaults.

    Args:
        layout: what the model offers.
    """
    found = []
    for name in list_methods():
        try:
            method = create_method(name)
        except (VlmtokError, TypeError):  # of another package, and it wants to be told something
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if refusal(method, layout) is None:
                found.append(name)
    return found


def knobs(method: Method, layout: Layout) -> list[Knob]:
    """What can be turned at a method, its strength first.

    Args:
        method: where the knobs stand.
        layout: what the model offers; its depth is how far layers go.

    Returns:
        One for each setting, or for each item of a tuple of numbers.
    """
    told = argument_docs(type(method))
    try:
        hints = typing.get_type_hints(type(method))
    except NameError:  # of another package, with names for type checkers alone
        hints = {}
    acts = max(layout.stages[site.stage].depth for site in method.sites(layout))
    # A method that acts at no layer may be sent to one.
    depth = acts if acts > 1 else max(stage.depth for stage in layout.stages.values())
    try:
        bases: tuple[Method, ...] = (method, type(method)())
    except (VlmtokError, TypeError):
        bases = (method,)
    found: list[Knob] = []
    for name, value in method.settings().items():
        asks = _Asks(bases, layout, name, _kinds(hints.get(name), value), depth)
        made = asks.items(value) if isinstance(value, tuple) else [asks.knob(value)]
        strong = name == method.budget_parameter
        found += [dataclasses.replace(one, strength=strong, what=told.get(name, "")) for one in made]
    return sorted(found, key=lambda knob: not knob.strength)


@dataclass(frozen=True)
class _Asks:
    """Asks a method which values one of its fields may have."""

    bases: tuple[Method, ...]
    layout: Layout
    name: str
    kinds: frozenset[type]
    depth: int

    def takes(self, value: Any) -> bool:
        """Whether a value is possible, with the other settings as they are or as they are by default."""
        return any(self._fits(base, value) for base in self.bases)

    def _fits(self, base: Method, value: Any) -> bool:
        try:
            made = dataclasses.replace(base, **{self.name: value})
        except (VlmtokError, ValueError, TypeError):
            return False
        # Counts may be layers, of which the model has so many.
        counts = value if isinstance(value, tuple) else (value,)
        return any(type(one) is not int for one in counts) or self._runs(made)

    def _allows(self, choice: Any) -> bool:
        """Whether the model can do what a choice asks for."""
        made = (dataclasses.replace(base, **{self.name: choice}) for base in self.bases)
        return any(map(self._runs, made))

    def _runs(self, made: Method) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return refusal(made, self.layout) is None

    def choices(self) -> tuple[Any, ...]:
        """What the method's own check names where it gets something that is nothing."""
        try:
            dataclasses.replace(self.bases[0], **{self.name: "?"})  # type: ignore[arg-type]
        except ParameterError as problem:
            return problem.choices
        except (ValueError, TypeError):
            pass
        return ()

    def knob(self, value: Any) -> Knob:
        optional = type(None) in self.kinds and self.takes(None)
        kind = type(value) if value is not None else next((k for k in (float, int, bool) if k in self.kinds), str)
        if kind is bool:
            return Knob(self.name, "switch", value)
        if kind in (float, int):
            values = tuple(v for v in self._numbers(kind, value) if self.takes(v))
            if len(values) > 1:
                return Knob(self.name, "share" if kind is float else "count", value, values, optional)
        choices = tuple(one for one in self.choices() if one == value or self._allows(one))
        if len(choices) > 1 and value in choices:
            return Knob(self.name, "choice", value, choices)
        return Knob(self.name, "typed", format_value(value))

    def items(self, value: tuple[Any, ...]) -> list[Knob]:
        """A knob for each number of a tuple, tried with the others where they are, and with them going along."""
        if not value or any(type(one) not in (int, float) for one in value):
            return [Knob(self.name, "typed", format_value(value))]
        made = []
        for place, one in enumerate(value):
            values = []
            for trial in self._numbers(type(one), one):
                alone = (*value[:place], trial, *value[place + 1 :])
                alike = tuple(trial for _ in value)
                in_turn = tuple(trial + i - place for i in range(len(value)))
                if self.takes(alone) or self.takes(alike) or (isinstance(one, int) and self.takes(in_turn)):
                    values.append(trial)
            made.append(
                Knob(self.name, "share" if isinstance(one, float) else "count", one, tuple(values), place=place)
            )
        return made

    def _numbers(self, kind: type, value: Any) -> Sequence[Any]:
        """Numbers to try: those of a fine scale from 0, and where one starts."""
        if kind is float:
            far = max(1.0, 2 * abs(value or 0.0))
            scale = [round(i * STEP, 6) for i in range(round(far / STEP) + 1)]
        else:
            scale = list(range(max(self.depth, WIDE * abs(value or 0)) + 1))
        return sorted({*scale, *([] if value is None else [value])})


def _kinds(hint: Any, value: Any) -> frozenset[type]:
    """The types of a field, by its annotation, and of what stands there."""
    several = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = typing.get_args(hint) if several else (hint,)
    return frozenset({part for part in parts if isinstance(part, type)} | {type(value)})
