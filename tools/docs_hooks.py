"""Hooks of mkdocs: pages that are made from the registry, files of the root, and sources as they are installed."""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from vlmtok import surface
from vlmtok.cli import app
from vlmtok.lab.pages import filled, root_pages, sections

ROOT = Path(__file__).parents[1]
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
    for section in made.values():
        for name, text in section.pages.items():
            files.append(File.generated(config, name, content=text))
    for name, text in root_pages(ROOT).items():
        files.append(File.generated(config, name, content=text))
    config.nav = filled(config.nav, made)
    return files
