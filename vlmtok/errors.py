"""Every error that vlmtok raises on purpose, and the one that takes the place of all others.

A message names what was asked, what was found and what is possible; it is raised before anything is changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class VlmtokError(Exception):
    """Base class of every error of this package."""


class ParameterError(VlmtokError, ValueError):
    """A parameter of a method or a function is out of its range.

    Attributes:
        choices: all values that are possible, where they are a few.
    """

    choices: tuple[Any, ...] = ()


class UnknownMethod(VlmtokError, LookupError):
    """No method of that name is registered."""


class SpecError(VlmtokError, ValueError):
    """A spec string such as ``"pitome:ratio=0.9"`` cannot be parsed."""


class UnsupportedModel(VlmtokError, TypeError):
    """No adapter carries this model, or the adapter names why it cannot."""


class MissingSignal(VlmtokError, LookupError):
    """A method asks for a signal that the model, the stage or the moment cannot give."""


class SiteError(VlmtokError, ValueError):
    """A method asks to act where the model has no such place, or where another method already acts."""


class PassError(VlmtokError, RuntimeError):
    """A block arrived out of order, from another thread, or without the start of its pass."""


class CacheError(VlmtokError, RuntimeError):
    """The key-value cache or the arguments of this call do not fit what was cut before."""


class HostChanged(VlmtokError, RuntimeError):
    """A call of the host library is not what the hooks take it for: another version, or a use that nobody foresaw."""


class TargetError(VlmtokError, ValueError):
    """A budget cannot be met; the message names the nearest one."""


class MissingPackage(VlmtokError, ImportError):
    """A package that only some forms and panels need is not installed; the message names the extra that brings it."""

    def __init__(self, asked: str, package: str, extra: str = "notebooks") -> None:
        super().__init__(f"{asked} needs {package}: pip install 'vlmtok[{extra}]'")


class NotCounted(VlmtokError, LookupError):
    """A total was asked for, and something that belongs to it is not counted; the message names it."""


class InternalError(VlmtokError, RuntimeError):
    """A fault of vlmtok itself: the one error that nobody raises on purpose.

    Args:
        kind: what was raised.
        said: its message.
        place: module and line of this package.
    """

    def __init__(self, kind: str, said: str, place: str) -> None:
        super().__init__(kind, said, place)
        self.kind, self.said, self.place = kind, said, place

    def __str__(self) -> str:
        return (
            f"this is a fault of vlmtok: {self.kind} at {self.place}{': ' if self.said else ''}{self.said}. Please "
            "report it with the call and the output of `vlmtok doctor`. The bare model is at hand meanwhile "
            "(run.paused(), or run.remove()); where it refuses the call too, its own error says what is wrong with the "
            "input"
        )


class VlmtokWarning(UserWarning):
    """Something that is allowed but probably not meant."""


def hint(name: str, known: Iterable[str], most: int = 1, alike: float = 0.5) -> str:
    """What goes behind a name that is not known: those like it, or a full stop.

    Args:
        name: as given; capitals make no difference.
        known: the names there are.
        most: how many to offer.
        alike: how much they must have in common, from 0 to 1.
    """
    by_letters: dict[str, str] = {}
    for one in known:
        by_letters.setdefault(one.lower(), one)
    near = [by_letters[one] for one in difflib.get_close_matches(name.lower(), by_letters, most, alike)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
