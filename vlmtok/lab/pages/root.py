"""Files of the repository's root that are pages as they are, but for their links."""

from __future__ import annotations

import re
from pathlib import Path

COPIED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Name in the root to page."""
HOME = ("README.md", "index.md")
"""What is not copied, and the page to which links to it lead."""


def root_pages(root: Path) -> dict[str, str]:
    """The files of `COPIED` as pages.

    Args:
        root: of the repository.
    """
    return {page: relinked((root / name).read_text(encoding="utf-8")) for name, page in COPIED.items()}


def relinked(text: str) -> str:
    """A text of the root as a page.

    Args:
        text: markdown with links relative to the root.

    Returns:
        The same: links to pages lead to them, links to other files of the repository have become names.
    """

    def link(found: re.Match[str]) -> str:
        said, path, anchor = found[1], found[2], found[3] or ""
        if path == HOME[0]:
            return f"[{said}]({HOME[1]})"
        if path in COPIED:
            return f"[{said}]({COPIED[path]}{anchor})"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{said}]({path.removeprefix('docs/')}{anchor})"
        return f"`{path}`" if said.strip("`") == path else f"{said} (`{path}`)"

    return re.sub(r"\[([^\]\n]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)
