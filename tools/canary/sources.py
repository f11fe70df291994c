"""Sources of a library as syntax trees, out of a wheel or a folder; nothing of it is imported or run."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

Definition = ast.ClassDef | ast.FunctionDef | ast.expr


class Module:
    """One file.

    Args:
        library: it belongs to.
        name: dotted.
        text: source.
        package: whether it is an ``__init__``.
    """

    def __init__(self, library: Library, name: str, text: str, package: bool) -> None:
        self.library = library
        self.name = name
        self.text = text
        self.package = package
        self.stars: list[str] = []
        self.imports: dict[str, tuple[str, str]] = {}

    @property
    def tree(self) -> ast.Module:
        """The whole file; nobody changes it."""
        return _parsed(self.text)

    @cached_property
    def defined(self) -> dict[str, Definition]:
        """Classes, functions and values of its top level by name; branches of conditions count too."""
        found: dict[str, Definition] = {}
        for node in _top(self.tree.body):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.setdefault(node.name, node)
            elif isinstance(node, ast.Assign):
                found.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom):
                self._import(node)
        return found

    def _import(self, node: ast.ImportFrom) -> None:
        parts = self.name.split(".")
        if node.level:
            parts = parts[: len(parts) - node.level + self.package]
        else:
            parts = []
        source = ".".join([*parts, *([node.module] if node.module else [])])
        for alias in node.names:
            if alias.name == "*":
                self.stars.append(source)
            else:
                self.imports[alias.asname or alias.name] = (source, alias.name)

    def find(self, name: str, depth: int = 8) -> tuple[Module, Definition] | None:
        """What a name of this module means, through imports within the library.

        Args:
            name: of a class, function or value.
            depth: how many imports to follow.
        """
        if name in self.defined:
            return self, self.defined[name]
        if not depth:
            return None
        if name in self.imports:
            source, there = self.imports[name]
            module = self.library.module(source)
            return None if module is None else module.find(there, depth - 1)
        for source in self.stars:
            module = self.library.module(source)
            found = None if module is None else module.find(name, depth - 1)
            if found is not None:
                return found
        return None


@lru_cache(maxsize=48)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _top(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those below conditions and handlers included."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for field in ("body", "orelse", "finalbody"):
                yield from _top(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _top(handler.body)


class Library:
    """The sources of one release.

    Args:
        package: name on the index.
        version: of the release.
        paths: files, as ``top/sub/file.py``.
        read: gives the text of one.
    """

    def __init__(self, package: str, version: str, paths: Iterable[str], read: Callable[[str], str]) -> None:
        self.package = package
        self.version = version
        self.paths = frozenset(path for path in paths if path.endswith(".py"))
        self._read = read
        self._modules: dict[str, Module | None] = {}
        self.classes: dict[tuple[str, str], Any] = {}  # by module and name, see `classes`

    @classmethod
    def of_wheel(cls, package: str, version: str, wheel: Path) -> Library:
        """The sources in a wheel."""
        archive = zipfile.ZipFile(wheel)
        return cls(package, version, archive.namelist(), lambda path: archive.read(path).decode())

    @classmethod
    def of_folder(cls, package: str, version: str, top: Path) -> Library:
        """The sources below a folder.

        Args:
            package: name on the index.
            version: of the release.
            top: the folder that has the name of the top module.
        """
        root = top.parent
        paths = [path.relative_to(root).as_posix() for path in top.rglob("*.py")]
        return cls(package, version, paths, lambda path: (root / path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def text(self, path: str) -> str:
        """The text of a file."""
        return self._read(path)

    def module(self, name: str) -> Module | None:
        """A module by its dotted name, or None where there is none."""
        if name not in self._modules:
            base = name.replace(".", "/")
            path = next((p for p in (f"{base}.py", f"{base}/__init__.py") if p in self.paths), None)
            self._modules[name] = (
                None if path is None else Module(self, name, self.text(path), path.endswith("__init__.py"))
            )
        return self._modules[name]

    def mentioning(self, pattern: str, paths: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Places where a pattern stands.

        Args:
            pattern: multi-line regular expression.
            paths: that files must match.

        Returns:
            Dotted names of modules with the match.
        """
        for path in sorted(self.paths):
            if re.fullmatch(paths, path):
                for match in re.finditer(pattern, self.text(path), re.M):
                    yield path.removesuffix(".py").replace("/", "."), match
