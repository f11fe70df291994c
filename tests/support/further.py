"""Cases of families that differ little from others: a share of them runs each time, all with ``--every-family``.

`families.test_bare` and whatever asks for no family by name run whole; of every other test each further family has a
third of its cases, never none.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from vlmtok.lab.tiny.further_families import FURTHER

from .lane import place, spread

NAMES = frozenset(family.name for family in FURTHER)
WHOLE = ("families/test_bare.py", "families/test_known_types.py")
SHARE = 3
"""One case in so many runs."""


def thinned(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases without those that are left out, in their order: the same in every worker."""
    groups: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        family = _family(item)
        if family is not None and place(item.path) not in WHOLE:
            groups[place(item.path), family].append(item)
    left_out = set()
    for (file, family), cases in groups.items():
        first = sum(map(ord, file + family)) % len(cases)  # families do not all have the same cases
        kept = {(place + first) % len(cases) for place in spread(len(cases), -(-len(cases) // SHARE))}
        left_out.update(id(case) for number, case in enumerate(cases) if number not in kept)
    return [item for item in items if id(item) not in left_out]


def _family(item: pytest.Item) -> str | None:
    """The further family of a case, if it is of one."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((value for value in values if isinstance(value, str) and value in NAMES), None)
