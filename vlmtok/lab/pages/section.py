"""A part of the site: pages that stand together, and where the site's navigation names them."""

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


def filled(navigation: Any, sections: Mapping[str, Section]) -> Any:
    """A navigation in which the folders of sections have become lists of their pages.

    Args:
        navigation: as it stands in ``mkdocs.yml``.
        sections: by folder.
    """
    if isinstance(navigation, list):
        return [filled(item, sections) for item in navigation]
    if isinstance(navigation, dict):
        return {title: filled(item, sections) for title, item in navigation.items()}
    return list(sections[navigation].navigation) if navigation in sections else navigation
