"""Every error that vlmtok raises on purpose.

A message names what was asked, what was found and what is possible; it is raised before anything is changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmtokError(Exception):
    """Base class of every error raised on purpose."""


class ParameterError(VlmtokError, ValueError):
    """A parameter of a method or a function is out of its range."""


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


class VlmtokWarning(UserWarning):
    """Something that is allowed but probably not meant."""


def hint(name: str, known: Iterable[str], most: int = 1, alike: float = 0.5) -> str:
    """What goes behind a name that is not known: those like it, or a full stop.

    Args:
        name: as given.
        known: the names there are.
        most: how many to offer.
        alike: how much they must have in common, from 0 to 1.
    """
    near = difflib.get_close_matches(name, known, most, alike)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
