"""Every import of the package, read off the files: those in functions and those for type checkers too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import vlmtok.adapters

import vlmtok

ROOTS = {"vlmtok": Path(vlmtok.__file__).parent, "vlmtok.adapters": Path(vlmtok.adapters.__file__).parent}


@dataclass(frozen=True)
class Import:
    """One imported name: which module asks which.

    Attributes:
        asks: full name of the module that imports.
        gives: full name of the module it imports, or from which.
        place: file and line.
        text: the line.
    """

    asks: str
    gives: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def files(roots: Mapping[str, Path] = ROOTS) -> dict[str, Path]:
    """Files by the full name of their module."""
    found = {}
    for package, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            if any(
                path.is_relative_to(other) for other in roots.values() if other != root and other.is_relative_to(root)
            ):
                continue  # an installed package has its adapters inside
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(modules: Mapping[str, Path]) -> Iterator[Import]:
    """All imports of some files; a name that is a module counts as that module."""
    for asks, path in modules.items():
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        home = asks.split(".") if path.name == "__init__.py" else asks.split(".")[:-1]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = home[: len(home) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                named = [
                    f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules else source for alias in node.names
                ]
            else:
                continue
            for gives in dict.fromkeys(named):
                yield Import(
                    asks, gives, f"{path.parent.name}/{path.name}:{node.lineno}", lines[node.lineno - 1].strip()
                )


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other, sorted; empty where there are none."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            cut = stack.index(name)
            group, stack[cut:] = stack[cut:], []
            if len(group) > 1 or name in arrows.get(name, ()):
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return sorted(found)
