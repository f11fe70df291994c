"""Hooks of mkdocs: pages that are made from the registry, pages that stand in the root, and sources as installed."""

from __future__ import annotations

import inspect
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from vlmtok import surface
from vlmtok.cli import app
from vlmtok.lab.pages import sections

ROOT = Path(__file__).parents[1]
COPIED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
"""Files of the root that are pages; links to README lead home."""
_sources: tempfile.TemporaryDirectory[str] | None = None


@event_priority(100)  # before mkdocstrings, which takes the paths as they are then
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copies the package and its adapters together and has mkdocstrings look there, and nowhere before.

    The folder ``adapters/`` of the checkout is `vlmtok.adapters`; a reader of sources looks for it inside the package.
    """
    global _sources
    _sources = tempfile.TemporaryDirectory(prefix="vlmtok-docs.")
    package = Path(_sources.name) / "vlmtok"
    left_out = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(ROOT / "vlmtok", package, ignore=left_out)
    shutil.copytree(ROOT / "adapters", package / "adapters", ignore=left_out)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_sources.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and puts them into the navigation where mkdocs.yml names their folder."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = sections(ROOT / "benchmarks" / "results", inspect.getsource(surface), typer.main.get_command(app))
    pages = {name: text for section in made.values() for name, text in section.pages.items()}
    for name, page in COPIED.items():
        if name != "README.md":
            pages[page] = relinked((ROOT / name).read_text(encoding="utf-8"))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    config.nav = _filled(config.nav, {folder: section.navigation for folder, section in made.items()})
    return files


def _filled(nav: Any, orders: dict[str, Any]) -> Any:
    """A navigation in which folders have become lists of their pages."""
    if isinstance(nav, list):
        return [_filled(item, orders) for item in nav]
    if isinstance(nav, dict):
        return {title: _filled(item, orders) for title, item in nav.items()}
    return list(orders[nav]) if nav in orders else nav


def relinked(text: str) -> str:
    """A text of the root as a page: links into docs/ start there, links to other files of the repository are names."""

    def link(found: re.Match[str]) -> str:
        said, path, anchor = found[1], found[2], found[3] or ""
        if path in COPIED:
            return f"[{said}]({COPIED[path]}{anchor if path != 'README.md' else ''})"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{said}]({path.removeprefix('docs/')}{anchor})"
        return f"`{path}`" if said in (path, f"`{path}`") else f"{said} (`{path}`)"

    return re.sub(r"\[([^\]\n]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)
