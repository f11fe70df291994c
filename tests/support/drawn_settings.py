"""Settings of methods that tests try: what a method takes of a short list of values, asked of its own checks."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import vlmtok
from vlmtok import Method
from vlmtok.core.settings import choices_noted
from vlmtok.errors import ParameterError

NUMBERS = (0, 1, 2, 3, 13, 700, 0.0, 0.1, 0.5, 1.0)
LISTS = (
    *((2, 3), (1, 2, 4), (7, 9, 12), (0, 3, 5), (3, 0.5), (4, -0.5), (0.75, 0.5), (0.5, 0.25, 0.125), (5, 3, 1)),
    *([3, 0, 2, 1], [0.9, 0.5, 1.0, 0.6]),
)


@functools.cache
def values(name: str) -> dict[str, tuple[Any, ...]]:
    """By setting, what a method takes of the list while its other settings are the defaults, and the default itself.

    Args:
        name: of the method.
    """
    kind = type(vlmtok.create_method(name))
    with choices_noted() as choices:
        base = kind()
    found = {}
    for setting in base.settings():
        tried = (None, True, False, *choices.get(setting, ()), *NUMBERS, *LISTS, getattr(base, setting))
        fine: dict[str, Any] = {}
        for value in tried:
            made = variant(base, **{setting: value})
            if made is not None:
                fine.setdefault(str(made), value)
        found[setting] = tuple(fine.values())
    return found


def variant(base: Method, **settings: Any) -> Method | None:
    """A method with other settings, or None where it refuses them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dataclasses.replace(base, **settings)
    except ParameterError:
        return None


def specs(name: str) -> list[str]:
    """Spec strings of a method: its defaults, and each value of each setting by itself."""
    base = vlmtok.create_method(name)
    made = [variant(base, **{setting: value}) for setting, taken in values(name).items() for value in taken]
    return list(dict.fromkeys(str(one) for one in (base, *made) if one is not None))
