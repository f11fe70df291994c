"""Tables of methods as markdown, made from the registry; names link to the pages that `vlmtok.lab.pages` makes."""

from __future__ import annotations

from collections.abc import Sequence

from .catalogue import Entry, adapters_of, methods, stages_of
from .family_table import ADAPTERS

DIFFERS = "differs"
"""Anchor of the section in a method's page that says how it differs from its release."""


def method_table() -> str:
    """The methods as markdown: what each is, and where it acts.

    Returns:
        A row for each method with paper, training, parity (and the reference vectors behind it) and the number of
        deviations; behind an empty line a row for each with the stages in which it acts, by adapter; and a note.
    """
    found = methods()
    return "\n\n".join((_papers(found), _places(found)))


def paper(entry: Entry) -> str:
    """Paper and official code of a method, as links where there are any."""
    title = f"[{entry.paper}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else entry.paper
    return title + (f", [code]({entry.code})" if entry.code else "")


def parity(entry: Entry) -> str:
    """What a method has been compared with; the patterns of its reference vectors are no emphasis."""
    return entry.parity.replace("*", "\\*")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; bars in cells do not end them.

    Args:
        heads: of the columns.
        rows: cells of each.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _papers(found: Sequence[Entry]) -> str:
    rows = []
    for entry in found:
        differs = f"[{len(entry.deviations)}]({entry.name}.md#{DIFFERS})" if entry.deviations else "-"
        free = "yes" if entry.training_free else "no"
        rows.append((f"[`{entry.name}`]({entry.name}.md)", paper(entry), free, parity(entry), differs))
    return table(("method", "paper", "training-free", "compared with its release", "differs in"), rows)


def _places(found: Sequence[Entry]) -> str:
    columns: dict[tuple[str, ...], list[str]] = {}
    for adapter, kinds in ADAPTERS.items():
        columns.setdefault(kinds, []).append(adapter)
    rows = []
    for entry in found:
        fit = adapters_of(entry.name)
        cells = [f"[`{entry.name}`]({entry.name}.md)"]
        for kinds, adapters in columns.items():
            stages = ", ".join(stages_of(entry.name, fit.get(adapters[0], ())))
            classed = "tower, no CLS" in kinds and "tower, no CLS" not in fit.get(adapters[0], ())
            cells.append(f"{stages} (CLS)" if stages and classed else stages or "-")
        rows.append(cells)
    heads = ["acts at", *("<br>".join(adapters) for adapters in columns.values())]
    note = "Which stages a vision-language family offers is in its own table."
    if any("(CLS)" in cell for row in rows for cell in row):
        note = f"(CLS): towers with a class token only. {note}"
    return f"{table(heads, rows)}\n\n{note}"
