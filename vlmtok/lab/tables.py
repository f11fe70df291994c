"""Tables of the README, made from the registry: ``python -m vlmtok.lab.tables README.md`` writes them anew.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end: NAME -->``; NAME is a key of `TABLES`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import VlmtokError
from .catalogue import Entry, adapters_of, methods, stages_of
from .family_table import ADAPTERS, family_table

_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(?=<!-- end: (?P=name) -->)", re.S)
_MARK = re.compile(r"<!-- (?:table|end): [\w-]+ -->")


class TableError(VlmtokError):
    """A text whose tables cannot be written."""


def method_table() -> str:
    """The methods as markdown: what each is, where it acts, and how it differs from its release.

    Returns:
        A row for each method with paper, training, parity (and the reference vectors behind it) and the number of
        deviations; a row for each with the stages in which it acts, by adapter; and the deviations, folded.
    """
    found = methods()
    return "\n\n".join((_papers(found), _places(found), _deviations(found)))


def _papers(found: Sequence[Entry]) -> str:
    rows = []
    for entry in found:
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else entry.paper
        code = f", [code]({entry.code})" if entry.code else ""
        differs = f"[{len(entry.deviations)}](#{entry.name}-differs)" if entry.deviations else "-"
        cells = (f"`{entry.name}`", paper + code, "yes" if entry.training_free else "no", entry.parity, differs)
        rows.append(cells)
    return _table(("method", "paper", "training-free", "compared with its release", "differs in"), rows)


def _places(found: Sequence[Entry]) -> str:
    columns: dict[tuple[str, ...], list[str]] = {}
    for adapter, kinds in ADAPTERS.items():
        columns.setdefault(kinds, []).append(adapter)
    rows = []
    for entry in found:
        fit = adapters_of(entry.name)
        cells = [f"`{entry.name}`"]
        for kinds, adapters in columns.items():
            stages = ", ".join(stages_of(entry.name, fit.get(adapters[0], ())))
            classed = "tower, no CLS" in kinds and "tower, no CLS" not in fit.get(adapters[0], ())
            cells.append(f"{stages} (CLS)" if stages and classed else stages or "-")
        rows.append(cells)
    heads = ["acts at", *("<br>".join(adapters) for adapters in columns.values())]
    note = "(CLS): towers with a class token only. Which stages a vision-language family offers is in its own table."
    return f"{_table(heads, rows)}\n\n{note}"


def _deviations(found: Sequence[Entry]) -> str:
    lines = ["<details><summary>Where methods differ from their releases</summary>", ""]
    for entry in found:
        if entry.deviations:
            lines += [f'<a id="{entry.name}-differs"></a>**{entry.name}**', ""]
            lines += [f"- {one}" for one in entry.deviations] + [""]
    return "\n".join([*lines, "</details>"])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


TABLES: Mapping[str, Callable[[], str]] = {"methods": method_table, "families": family_table}
"""Name of a table to what makes it."""


def rewritten(text: str) -> str:
    """A text with its tables made anew.

    Args:
        text: markdown.

    Returns:
        The same, with every block filled.

    Raises:
        TableError: a block has an unknown name or no end.
    """

    def fill(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in TABLES:
            raise TableError(f"no table {name!r}; tables: {', '.join(TABLES)}")
        return f"{block[1]}\n{TABLES[name]()}\n\n"

    marks = _MARK.findall(text)
    if len(marks) != 2 * len(_BLOCK.findall(text)):
        raise TableError(f"tables need <!-- table: NAME --> and <!-- end: NAME --> in turn, found {', '.join(marks)}")
    return _BLOCK.sub(fill, text)


def main(paths: Sequence[str]) -> int:
    """Writes the tables of files anew; with ``--check`` tells which are out of date instead.

    Args:
        paths: files, and perhaps ``--check``.

    Returns:
        0, or 1 where a checked file is out of date.
    """
    check, stale = "--check" in paths, 0
    for path in (Path(path) for path in paths if path != "--check"):
        text = path.read_text(encoding="utf-8")
        new = rewritten(text)
        if new == text:
            continue
        stale += 1
        if check:
            print(f"{path}: tables are out of date; python -m vlmtok.lab.tables {path}")
        else:
            path.write_text(new, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
