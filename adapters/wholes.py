"""Which model a module is part of: hosts keep no way up, and a part cannot always be compressed without the whole."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import nn


def parents(part: nn.Module) -> Iterator[nn.Module]:
    """Modules that hold a module as a child of theirs, by what the garbage collector knows of references."""
    for table in gc.get_referrers(part):
        # Each look at referrers goes through all objects of the process, so tables of other things are left out first.
        if not isinstance(table, dict) or not all(v is None or isinstance(v, nn.Module) for v in table.values()):
            continue
        for owner in gc.get_referrers(table):
            # The attributes of an object may lie in a dict of their own.
            found: list[Any] = gc.get_referrers(owner) if isinstance(owner, dict) else [owner]
            yield from (one for one in found if isinstance(one, nn.Module) and one._modules is table)


def wholes(part: nn.Module) -> Iterator[nn.Module]:
    """All modules above a module, nearest first."""
    seen, waiting = {id(part)}, [part]
    while waiting:
        for parent in parents(waiting.pop(0)):
            if id(parent) not in seen:
                seen.add(id(parent))
                waiting.append(parent)
                yield parent
