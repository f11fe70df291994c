"""Names of all methods, and a method that takes whatever a spec string can say."""

from __future__ import annotations

from dataclasses import dataclass

import vlmtok
from vlmtok import Method

METHODS = vlmtok.list_methods()


@dataclass(eq=False)
class Anything(Method):
    """Takes whatever a spec string can say."""

    a: object = 1
    b: object = None
