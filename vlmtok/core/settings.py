"""Settings of methods: checks and counts that methods share, and how a setting is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

from ..errors import ParameterError, VlmtokWarning
from .site import Counts

POOLINGS = ("size", "plain", "attention")
"""What a merged token counts in heads that pool: its size in means; one; its size in means and attention pools."""

_CHOICES: ContextVar[dict[str, tuple[Any, ...]] | None] = ContextVar("choices", default=None)


@contextmanager
def choices_noted() -> Iterator[dict[str, tuple[Any, ...]]]:
    """Context in which checks of words and switches note what there is to choose from, by parameter."""
    found: dict[str, tuple[Any, ...]] = {}
    before = _CHOICES.set(found)
    try:
        yield found
    finally:
        _CHOICES.reset(before)


def _note(name: str, choices: tuple[Any, ...]) -> None:
    found = _CHOICES.get()
    if found is not None:
        found[name] = choices


def plain_numbers(value: Any) -> Any:
    """A setting with Python's numbers in place of NumPy's."""
    if type(value) in (list, tuple):
        return type(value)(plain_numbers(item) for item in value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def check_keep(keep: float | int, by: str, name: str = "keep") -> float | int:
    """Checks a `keep` parameter: a float in (0, 1] is a share, an int >= 1 a count.

    Raises:
        ParameterError: anything else, bool included.
    """
    fine = (isinstance(keep, float) and 0.0 < keep <= 1.0) or (isinstance(keep, int) and keep >= 1)
    if isinstance(keep, bool) or not fine:
        raise ParameterError(
            f"{by}: {name}={keep!r} is not possible; a float in (0, 1] is a share of the tokens that arrive, "
            "an int >= 1 a count"
        )
    return keep


def keep_count(keep: float | int, n: int) -> int:
    """How many of n tokens `keep` leaves: a share rounds half up, at least 1; a count is capped at n.

    Args:
        keep: as checked by `check_keep`.
        n: tokens that arrive.

    Returns:
        A number between 0 (only for n = 0) and n.
    """
    wanted = int(keep * n + 0.5) if isinstance(keep, float) else keep
    return min(n, max(1, wanted))


def share_of_entered(counts: Counts, ratio: float) -> int:
    """How many tokens a share of those that entered the decoder leaves, rounded down as in the releases.

    Args:
        counts: the view as host ints.
        ratio: share of ``counts.entered``.

    Returns:
        Between 1 and ``counts.n`` (0 only for n = 0).
    """
    return min(counts.n, max(1, int(counts.entered * ratio)))


def scaled(value: Any, level: float, tokens: int) -> Any:
    """A `keep` parameter, or several, at a level of reduction.

    Args:
        value: a share (float), a count (int), or a sequence of them.
        level: from 0 (almost nothing is kept) to 1 (everything).
        tokens: that a count of everything would be.

    Returns:
        The level itself for a share, its part of `tokens` for a count. A sequence becomes shares, all times one factor
        and at most 1; at level 1/2 they are what they were.
    """
    if isinstance(value, (tuple, list)):
        factor = level / max(1.0 - level, 1e-9)
        shares = (one if isinstance(one, float) else one / tokens for one in value)
        return type(value)(min(1.0, max(1e-9, share * factor)) for share in shares)
    if isinstance(value, int):
        return max(1, round(level * tokens))
    return max(level, 1e-9)


def check_range(
    value: Any, by: str, name: str, low: float = float("-inf"), high: float = float("inf"), kind: type = float
) -> None:
    """Checks a number.

    Args:
        value: what the user gave.
        by: the method's name.
        name: the parameter's name.
        low: smallest value allowed.
        high: largest value allowed.
        kind: `int` or `float` (an int is a float too; bool is neither).

    Raises:
        ParameterError: not a finite number of that kind, or outside.
    """
    number = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not number or not math.isfinite(value) or not low <= value <= high:
        what = "a number" if kind is float else "an integer"
        raise ParameterError(f"{by}: {name}={value!r} must be {what} in [{low:g}, {high:g}]")


def check_flag(value: Any, by: str, name: str) -> None:
    """Checks a switch.

    Raises:
        ParameterError: neither True nor False (1 and 0 are neither).
    """
    _note(name, (True, False))
    if not isinstance(value, bool):
        raise ParameterError(f"{by}: {name}={value!r} must be true or false")


def check_layers(values: Sequence[Any], depth: int, by: str, name: str) -> None:
    """Checks a list with one value a layer; a short one, which leaves the later layers alone, gets a warning.

    Raises:
        ParameterError: it names layers that the tower has not.
    """
    if len(values) > depth:
        raise ParameterError(f"{by}: {name} names {len(values)} layers, and the tower has {depth}")
    if len(values) < depth:
        rest = f"layer {depth - 1} merges" if len(values) == depth - 1 else f"layers {len(values)} to {depth - 1} merge"
        warnings.warn(
            f"{by}: {name} names {len(values)} of the tower's {depth} layers; {rest} nothing",
            VlmtokWarning,
            stacklevel=2,
        )


def check_layer(value: Any, by: str, name: str) -> None:
    """Checks one layer, or None for a method's own; whether a model has it is found out on the model.

    Raises:
        ParameterError: neither None nor an integer.
    """
    if value is not None:
        check_range(value, by, name, kind=int)


def check_schedule(layers: Sequence[int] | None, ratios: Sequence[float], by: str) -> None:
    """Checks a schedule of cuts inside a decoder.

    Args:
        layers: 0-based layers that run with fewer tokens than the one before, or None for a method's own.
        ratios: share of the tokens that entered the decoder, for each of them.
        by: the method's name.

    Raises:
        ParameterError: layers do not ascend or start below 1, shares lie outside (0, 1] or grow, or the two differ
            in number.
    """
    if not isinstance(ratios, (tuple, list)) or not ratios:
        raise ParameterError(f"{by}: ratios={ratios!r} must be a tuple with one share for each cut")
    for ratio in ratios:
        check_range(ratio, by, "ratios", 0, 1)
    if 0 in ratios or any(later > earlier for earlier, later in pairwise(ratios)):
        raise ParameterError(f"{by}: ratios={ratios!r} must lie in (0, 1] and never grow: tokens do not come back")
    if layers is not None:
        check_schedule_layers(layers, by, cuts=len(ratios))


def check_schedule_layers(
    layers: Sequence[int], by: str, name: str = "layers", *, cuts: int | None = None, low: int = 1
) -> None:
    """Checks the layers of a schedule.

    Args:
        layers: 0-based layers.
        by: the method's name.
        name: the parameter's name.
        cuts: how many there must be; None for any number but none.
        low: the first layer that may be named.

    Raises:
        ParameterError: not that many, not ascending, or below `low`.
    """
    if not isinstance(layers, (tuple, list)) or not layers:
        raise ParameterError(f"{by}: {name}={layers!r} must be a tuple of layers")
    if cuts is not None and len(layers) != cuts:
        raise ParameterError(f"{by}: {name}={layers!r} must name one layer for each of the {cuts} cuts")
    for layer in layers:
        check_range(layer, by, name, low, kind=int)
    if list(layers) != sorted(set(layers)):
        raise ParameterError(f"{by}: {name}={layers!r} must ascend")


def check_choice(value: Any, by: str, name: str, choices: tuple[Any, ...]) -> None:
    """Checks a word.

    Raises:
        ParameterError: it is none of the choices.
    """
    _note(name, choices)
    if value not in choices:
        problem = ParameterError(f"{by}: {name}={value!r} is not possible; one of {', '.join(map(repr, choices))}")
        problem.choices = choices
        raise problem


def format_value(value: Any) -> str:
    """A value as `parse_methods` reads it back."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        inside = ";".join(format_value(item) for item in value)
        if isinstance(value, tuple):
            return f"({inside}{';' if len(value) == 1 else ''})"
        return f"[{inside}]"
    if isinstance(value, float):
        return repr(value)
    return str(value)
