"""Layer profiles: which share of its entries each layer of a language model keeps, as files and in entries."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ParameterError

_LEAST = 1e-6
"""A layer of share 0 counts as one of so much: it fills up where all others are full."""


@dataclass(frozen=True)
class LayerProfile:
    """Which share of its entries each layer keeps.

    Attributes:
        shares: one for each layer of a language model, from the first to the last, each in [0, 1].
        model: of which model; empty where nobody said.
        keep: the share that all layers together were to keep, or None.
        samples: over how many samples it is a mean; 0 where it is none.
    """

    shares: tuple[float, ...]
    model: str = ""
    keep: float | None = None
    samples: int = 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file with the attributes, which `read_profile` reads.

        Args:
            path: of the file; one that is there is replaced.
        """
        held = {"model": self.model, "keep": self.keep, "samples": self.samples, "shares": list(self.shares)}
        Path(path).write_text(json.dumps(held, indent=1) + "\n", "utf-8")

    def spread(self, depth: int) -> tuple[float, ...]:
        """The shares for another number of layers, interpolated linearly from the first layer to the last.

        Args:
            depth: layers, at least 1.

        Returns:
            `depth` shares; those of the profile where it has as many.
        """
        return _spread(self.shares, depth)

    def entries(self, keep: float | int, n: int, depth: int) -> tuple[int, ...]:
        """How many entries each layer keeps where each holds as many.

        Shares are multiplied by one factor, and what a full layer cannot take goes to the others. A larger `keep` never
        leaves a layer fewer.

        Args:
            keep: share of all entries of all layers (half of one rounds up), or entries that a layer keeps on average.
            n: entries of each layer.
            depth: layers.

        Returns:
            `depth` numbers, each at least 1 and at most n, whose sum is exactly what `keep` says, or one a layer where
            that is less; the first layers win a tie.
        """
        total = int(keep * n * depth + 0.5) if isinstance(keep, float) else min(keep, n) * depth
        return _entries(self.spread(depth), n, max(total, depth)) if n else (0,) * depth


@functools.lru_cache(256)
def _spread(shares: tuple[float, ...], depth: int) -> tuple[float, ...]:
    if len(shares) == depth:
        return shares
    found = []
    for layer in range(depth):
        at = layer * (len(shares) - 1) / (depth - 1) if depth > 1 else (len(shares) - 1) / 2
        low = min(int(at), len(shares) - 1)
        high = min(low + 1, len(shares) - 1)
        found.append(shares[low] + (at - low) * (shares[high] - shares[low]))
    return tuple(found)


@functools.lru_cache(256)
def _entries(shares: tuple[float, ...], n: int, total: int) -> tuple[int, ...]:
    """Numbers by rounding shares times one factor, which halvings find; ties are settled in the order of the layers."""
    weight = [max(share, _LEAST) * n for share in shares]

    def at(factor: float) -> list[int]:
        return [min(n, max(1, math.floor(factor * one + 0.5))) for one in weight]

    low, high = 0.0, (n + 1) / min(weight)
    for _ in range(100):  # down to neighbouring floats
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    found, most = at(low), at(high)
    missing = total - sum(found)
    while missing:  # of those that the next factor would give one more; several a layer only by rounding
        for layer in range(len(found)):
            if missing and found[layer] < most[layer]:
                found[layer] += 1
                missing -= 1
    return tuple(found)


def as_profile(given: Any, by: str) -> LayerProfile:
    """What a user may give for a profile, as one.

    Args:
        given: path of a JSON file, a mapping like what it holds, shares of the layers, or a profile.
        by: who asks, for errors.

    Raises:
        ParameterError: something else, the file cannot be read, or shares are none.
    """
    if isinstance(given, LayerProfile):
        return given
    if isinstance(given, (str, os.PathLike)) and os.fspath(given).endswith(".json"):
        return read_profile(given, by)
    if isinstance(given, Mapping):
        return _of_mapping(given, by, "the mapping")
    if isinstance(given, (tuple, list)):
        return LayerProfile(_checked(given, by, "profile"))
    raise ParameterError(
        f"{by}: profile={given!r} is not possible; a path to a file (.json), a mapping with 'shares', a tuple with "
        "one share for each layer, or None"
    )


def read_profile(path: str | os.PathLike[str], by: str = "read_profile") -> LayerProfile:
    """Reads a profile.

    Args:
        path: of a JSON file as `LayerProfile.save` writes it: an object with ``shares``, and ``model``, ``keep`` and
            ``samples`` where they are known.
        by: who asks, for errors.

    Raises:
        ParameterError: there is no such file, or it holds something else.
    """
    try:
        held = json.loads(Path(path).read_text("utf-8"))
    except OSError as problem:
        raise ParameterError(f"{by}: the profile {os.fspath(path)!r} cannot be read ({problem.strerror})") from problem
    except ValueError as problem:
        raise ParameterError(f"{by}: the profile {os.fspath(path)!r} is no JSON file ({problem})") from problem
    if not isinstance(held, Mapping):
        raise ParameterError(
            f"{by}: the profile {os.fspath(path)!r} holds a {type(held).__name__}, not an object with 'shares', the "
            "share of its entries that each layer keeps (of released lists, which hold shares that go, 1 - share)"
        )
    return _of_mapping(held, by, repr(os.fspath(path)))


def _of_mapping(held: Mapping[str, Any], by: str, where: str) -> LayerProfile:
    if not isinstance(held.get("shares"), (tuple, list)):
        raise ParameterError(f"{by}: {where} has no list 'shares', one for each layer; it has: {', '.join(held)}")
    shares = _checked(held["shares"], by, f"'shares' of {where}")
    model, keep, samples = held.get("model") or "", held.get("keep"), held.get("samples") or 0
    if keep is not None and not _is_share(keep):
        raise ParameterError(f"{by}: 'keep' of {where} is {keep!r}, no share in [0, 1]")
    if not isinstance(model, str) or isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ParameterError(f"{by}: 'model' of {where} must be a text and 'samples' a number from 0 on")
    return LayerProfile(shares, model, keep, samples)


def _checked(shares: Sequence[Any], by: str, where: str) -> tuple[float, ...]:
    if not shares or not all(map(_is_share, shares)) or not any(shares):
        raise ParameterError(
            f"{by}: {where} must hold one share in [0, 1] for each layer, of the entries that stay, and not all 0; got "
            f"{list(shares)!r}"
        )
    return tuple(float(share) for share in shares)


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1
