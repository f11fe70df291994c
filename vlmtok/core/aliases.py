"""Other names of parameters: what a method's paper or its released code calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..errors import ParameterError

Convert = Callable[[Any, Mapping[str, Any]], Any]
"""From a value as the paper has it and all settings that were given, to the parameter's value."""


@dataclass(frozen=True)
class Alias:
    """A name that stands for a parameter, or for no single one and says so.

    Attributes:
        name: as typed.
        parameter: what it stands for; empty where it is no single parameter.
        whose: who calls it that.
        formula: where it is another quantity, how the parameter follows from it.
        convert: the same as a function; None takes the value as it is.
        instead: where there is no parameter, what to write.
    """

    name: str
    parameter: str = ""
    whose: str = "the paper"
    formula: str = ""
    convert: Convert | None = None
    instead: str = ""

    @property
    def meaning(self) -> str:
        """What it stands for, in a few words."""
        return f"{self.parameter} = {self.formula}" if self.formula else self.parameter


def rest_of(share: float) -> float:
    """One minus a share, exact to the last decimal that was written."""
    return float(1 - Decimal(repr(share)))


def share_that_goes(name: str, parameter: str, by: str, whose: str = "the paper") -> Alias:
    """An alias for 1 minus a share that stays; exact to the last decimal that was written.

    Args:
        name: the alias.
        parameter: the share that stays.
        by: the method, for the error.
        whose: who calls it that.
    """

    def convert(value: Any, settings: Mapping[str, Any]) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < 1:
            raise ParameterError(
                f"{by}: {name}={value!r} is not possible; it is the share of the tokens that goes, in [0, 1)"
            )
        return rest_of(value)

    return Alias(name, parameter, whose, f"1 - {name}", convert)


def resolve(method: str, aliases: Iterable[Alias], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names of the parameters.

    Args:
        method: name of the method.
        aliases: its other names.
        settings: as given.

    Raises:
        ParameterError: a parameter is given twice, a name stands for no single parameter, or a value cannot be
            converted.
    """
    known = {alias.name: alias for alias in aliases}
    found = {name: value for name, value in settings.items() if name not in known}
    said = {name: name for name in found}
    for name, value in settings.items():
        if name not in known:
            continue
        alias = known[name]
        if not alias.parameter:
            raise ParameterError(f"{method} has no single parameter {name!r}: {alias.instead}")
        if alias.parameter in said:
            raise ParameterError(f"{method}: {said[alias.parameter]} and {name} are one parameter; give one of them")
        said[alias.parameter] = name
        found[alias.parameter] = value if alias.convert is None else alias.convert(value, settings)
    return found


def spoken(aliases: Iterable[Alias], used: Iterable[str]) -> str:
    """What an error adds where other names were used: the parameters for which they stand."""
    named = [f"{alias.name} stands for {alias.meaning}" for alias in aliases if alias.name in set(used)]
    return f" ({'; '.join(named)})" if named else ""
