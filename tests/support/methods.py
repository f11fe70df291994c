"""Names of all methods, and a method that takes whatever a spec string can say."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import vlmtok
from vlmtok import Method
from vlmtok.errors import VlmtokError

from . import asking

METHODS = vlmtok.list_methods()


def cuts(name: str) -> bool:
    """Whether a method makes rows shorter; one that leaves work out for tokens instead keeps them all."""
    return vlmtok.method_class(name).skip is Method.skip


@functools.cache
def on_caches(name: str) -> bool:
    """Whether entries of caches leave by a method, and no tokens: the prompt's own output stays as it is."""
    try:
        return {site.stage for site in vlmtok.create_method(name).sites(asking.llava())} == {"cache"}
    except VlmtokError:
        return False  # of towers alone


@dataclass(eq=False)
class Anything(Method):
    """Takes whatever a spec string can say."""

    a: object = 1
    b: object = None
