"""A part of the site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """Pages that stand together.

    Attributes:
        pages: path below ``docs/`` to markdown.
        navigation: as mkdocs takes it: paths, and titles to paths or to such lists.
    """

    pages: Mapping[str, str]
    navigation: Sequence[Any]
