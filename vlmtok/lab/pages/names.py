"""Reference of the public names: a page for each group that the table of the package's surface has."""

from __future__ import annotations

import ast
import io
import re
import tokenize

from ...core.registry import list_methods, method_class
from ...errors import VlmtokError
from .section import Section

MODULES, METHODS = "modules", "methods"
"""Groups that no comment of the table names: its first names, and the classes of the registry."""


class SurfaceError(VlmtokError):
    """A table of public names that cannot be read."""


def groups(surface: str) -> dict[str, list[str]]:
    """Public names by group.

    Args:
        surface: source of the table ``HOME``; a comment on a line of its own begins a group.

    Returns:
        Title to names, the methods' classes last.

    Raises:
        SurfaceError: there is no such table, or names of it are missing in what was found.
    """
    named = _home(surface)
    within = range(named.lineno, (named.end_lineno or named.lineno) + 1)
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(surface).readline)
        if token.type == tokenize.COMMENT and token.start[0] in within and token.line.lstrip().startswith("#")
    }
    keys = {key.lineno: key.value for key in named.keys if isinstance(key, ast.Constant)}
    title = MODULES
    found: dict[str, list[str]] = {MODULES: []}
    for line in sorted({*comments, *keys}):
        if line in comments:
            title = comments[line]
            found[title] = []
        else:
            found[title].append(str(keys[line]))
    if sum(map(len, found.values())) != len(named.keys):
        raise SurfaceError("names of HOME share a line; each stands on its own")
    return {**{one: names for one, names in found.items() if names}, METHODS: _classes()}


def name_pages(surface: str) -> Section:
    """A page for each group of public names, and an index of all.

    Args:
        surface: as in `groups`.
    """
    found = groups(surface)
    made = {f"reference/{_slug(title)}.md": _page(title, names) for title, names in found.items()}
    rows = [
        f"## {_title(title)}\n\n" + "\n".join(f"- [`vlmtok.{name}`][vlmtok.{name}]" for name in names)
        for title, names in found.items()
    ]
    said = "These names are public; everything else may move. `dir(vlmtok)` lists them."
    made["reference/index.md"] = f"# Public names\n\n{said}\n\n" + "\n\n".join(rows) + "\n"
    return Section(made, ["reference/index.md", *({_title(one): f"reference/{_slug(one)}.md"} for one in found)])


def _page(title: str, names: list[str]) -> str:
    return f"# {_title(title)}\n\n" + "\n\n".join(f"::: vlmtok.{name}" for name in names) + "\n"


def _classes() -> list[str]:
    return [method_class(name).__name__ for name in list_methods()]


def _home(surface: str) -> ast.Dict:
    for node in ast.parse(surface).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            continue
        if isinstance(node.target, ast.Name) and node.target.id == "HOME":
            return node.value
    raise SurfaceError("the surface has no table HOME that is written down as a dict")


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("'", "")).strip("-")
