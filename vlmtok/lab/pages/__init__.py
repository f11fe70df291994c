"""Pages of the documentation that nobody writes: methods, families, public names, commands; made when it is built.

A new method, family, name or command gets its page or its row without an edit here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .commands import command_page
from .families import family_pages
from .measured import Measured
from .methods import method_pages
from .names import name_pages
from .root import root_pages
from .section import Section, filled

__all__ = ["Section", "filled", "root_pages", "sections"]


def sections(results: Path, surface: str, commands: Any) -> dict[str, Section]:
    """Every page, by section of the site.

    Args:
        results: folder of the committed measurements.
        surface: source of `vlmtok.surface`, whose comments name the groups of public names.
        commands: the command line, as `typer.main.get_command` gives it.

    Returns:
        Folder below ``docs/`` to its pages and their order.
    """
    named, page = name_pages(surface), "reference/commands.md"
    reference = Section({**named.pages, page: command_page(commands)}, [*named.navigation, {"Command line": page}])
    return {"methods/": method_pages(Measured.read(results)), "families/": family_pages(), "reference/": reference}
