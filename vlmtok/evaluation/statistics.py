"""Intervals of differences between two ways of answering the same questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ParameterError

DRAWS = 2000
LEVEL = 0.95
_CHUNK = 2_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Difference:
    """How much better a way is than another, over questions.

    Attributes:
        mean: in the unit of the quality.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def paired_difference(
    way: np.ndarray, other: np.ndarray, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> Difference:
    """The mean difference over questions with its paired percentile bootstrap interval (Efron, 1979).

    Each draw takes as many questions as there are, with replacement, the same ones of both; where a question was
    answered several times, because the way draws, one of the answers, so that the interval covers that as well.

    Args:
        way: quality by question and repeat, `[N, R]`.
        other: of the same questions, `[N, S]`.
        draws: how many.
        level: of the interval, in (0, 1).
        seed: of the draws.

    Raises:
        ParameterError: no questions, or not the same number.
    """
    if not len(way) or len(way) != len(other):
        raise ParameterError(f"a paired difference needs the same questions of both, got {len(way)} and {len(other)}")
    way, other = (np.asarray(part, float).reshape(len(part), -1) for part in (way, other))
    rng = np.random.default_rng(seed)
    number = len(way)
    found = []
    for first in range(0, draws, max(1, _CHUNK // number)):
        some = min(max(1, _CHUNK // number), draws - first)
        rows = rng.integers(number, size=(some, number))
        sides = [part[rows, rng.integers(part.shape[1], size=rows.shape)] for part in (way, other)]
        found.append((sides[0] - sides[1]).mean(1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Difference(float((way.mean(1) - other.mean(1)).mean()), float(low), float(high))
