"""Names of all methods, and a method that takes whatever a spec string can say."""

from __future__ import annotations

from dataclasses import dataclass

import vlmtok
from vlmtok import Method

METHODS = vlmtok.list_methods()


def cuts(name: str) -> bool:
    """Whether a method makes rows shorter; one that leaves work out for tokens instead keeps them all."""
    return vlmtok.method_class(name).skip is Method.skip


@dataclass(eq=False)
class Anything(Method):
    """Takes whatever a spec string can say."""

    a: object = 1
    b: object = None
