"""Which combinations of a sweep a run takes: every value beside every other in turn, not every pair each time.

A product of axes grows faster than what it finds. `some` keeps the combinations whose places in their axes add up to
a multiple of `every`: each value still occurs, with several partners of each other axis. ``VLMTOK_SWEEP=every`` takes
all.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

EVERYTHING = os.environ.get("VLMTOK_SWEEP") == "every"


def some(*axes: Sequence[Any], every: int) -> list[tuple[Any, ...]]:
    """Combinations of axes, thinned.

    Args:
        axes: values of each argument, in the order of the argument names.
        every: one in so many is kept.

    Returns:
        Tuples for `pytest.mark.parametrize`.
    """
    places = itertools.product(*(range(len(axis)) for axis in axes))
    kept = [at for at in places if EVERYTHING or sum(at) % every == 0]
    for number, axis in enumerate(axes):
        assert {at[number] for at in kept} == {*range(len(axis))}, "a value of an axis is never taken"
    return [tuple(axis[place] for axis, place in zip(axes, at)) for at in kept]
