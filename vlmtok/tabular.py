"""Tables of words and numbers in the forms that people paste: terminal, Markdown, HTML, LaTeX, CSV, pandas."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import MissingPackage

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # both mean something behind the \\ of the row above
    "*": "{*}",
}
_MARKDOWN = re.compile(r"[\\|<*`]")


@dataclass(frozen=True)
class Table:
    """Cells as text, with one header.

    Attributes:
        head: names of the columns.
        rows: cells, as many a row as there are columns.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which are set to the right; the first one holds names."""
        return column > 0 and all(not row[column] or re.match(r"[-+]?\d", row[column]) for row in self.rows)

    def markdown(self) -> str:
        """GitHub's Markdown, numbers to the right."""
        marks = ["---:" if self.numeric(column) else "---" for column in range(len(self.head))]
        lines = [self.head, marks, *self.rows]

        def said(cell: str) -> str:
            return _MARKDOWN.sub(r"\\\g<0>", _one_line(cell))

        return "\n".join(f"| {' | '.join(map(said, line))} |" for line in lines)

    def html(self) -> str:
        """A ``<table>``, numbers to the right."""
        side = ["right" if self.numeric(column) else "left" for column in range(len(self.head))]

        def line(tag: str, cells: Sequence[str]) -> str:
            made = (f'<{tag} style="text-align:{s}">{html.escape(c)}</{tag}>' for s, c in zip(side, cells))
            return f"<tr>{''.join(made)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        return f"<table><thead>{line('th', self.head)}</thead><tbody>{body}</tbody></table>"

    def latex(self) -> str:
        """A ``tabular`` with the rules of booktabs."""
        columns = "".join("r" if self.numeric(column) else "l" for column in range(len(self.head)))

        def line(cells: Sequence[str]) -> str:
            made = ("".join(_LATEX.get(letter, letter) for letter in _one_line(cell)) for cell in cells)
            return " & ".join(made) + r" \\"

        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(self.head), r"\midrule"]
        return "\n".join([*lines, *map(line, self.rows), r"\bottomrule", r"\end{tabular}"])

    def rich(self) -> Any:
        """A table of rich."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable()
        for column, name in enumerate(self.head):
            table.add_column(name, justify="right" if self.numeric(column) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


class Records:
    """Something that is a list of records, and the forms that programs read."""

    def to_records(self) -> list[dict[str, Any]]:
        """Rows as numbers and words by column."""
        raise NotImplementedError

    def to_csv(self) -> str:
        """`to_records` as CSV; whole numbers without a point."""
        return csv_of(self.to_records())

    def to_pandas(self) -> Any:
        """`to_records` as a pandas.DataFrame.

        Raises:
            MissingPackage: pandas is not installed.
        """
        return frame_of(self.to_records())


class Tabular(Records):
    """Something that is a table: what it prints, and the forms that people paste, from its records and its cells."""

    def table(self) -> Table:
        """Rows as people read them."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What to know before a number is trusted, shown below the table."""
        return []

    def to_markdown(self) -> str:
        """The table in Markdown, its notes as a list."""
        notes = "\n".join(f"- {note}" for note in self.notes())
        return self.table().markdown() + "\n" + (f"\n{notes}\n" if notes else "")

    def to_latex(self) -> str:
        """The table for LaTeX, with the rules of booktabs; its notes as comments."""
        return "".join(f"% {note}\n" for note in self.notes()) + self.table().latex() + "\n"

    def _repr_html_(self) -> str:
        notes = self.notes()
        return self.table().html() + (f"\n{bullets(notes)}" if notes else "")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The table and its notes for a rich console."""
        from rich.text import Text

        yield self.table().rich()
        yield from (Text(note, style="dim") for note in self.notes())

    def __str__(self) -> str:
        return plain(*self.__rich_console__(None, None), width=160)


def bullets(lines: Iterable[str], attributes: str = "") -> str:
    """Lines as a ``<ul>``; nothing where there are none.

    Args:
        lines: as text.
        attributes: of the list, with a space in front.
    """
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul{attributes}>{items}</ul>" if items else ""


def plain(*parts: Any, width: int = 120) -> str:
    """What rich prints of some parts, as text without colours, wherever it is called from.

    Args:
        parts: what a console of rich prints.
        width: columns.
    """
    from rich.console import Console, Group

    out = io.StringIO()
    # A notebook's console would display instead of writing.
    Console(file=out, width=width, color_system=None, force_jupyter=False, force_terminal=False).print(Group(*parts))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def csv_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV: the columns of all, whole numbers as such, None and what a record lacks as nothing."""
    out = io.StringIO()
    if records:
        # The writer of older Pythons leaves a lone carriage return bare, at which readers end the line.
        bare = any("\r" in value for record in records for value in record.values() if isinstance(value, str))
        how: Any = csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
        writer = csv.DictWriter(out, columns_of(records), lineterminator="\n", quoting=how)
        writer.writeheader()
        writer.writerows({key: number(value) for key, value in record.items()} for record in records)
    return out.getvalue()


def columns_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all columns, in the order in which records first have them."""
    return list(dict.fromkeys(name for record in records for name in record))


def number(value: Any) -> Any:
    """A whole number as an int, whatever it was counted in."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def frame_of(records: Sequence[Mapping[str, Any]]) -> Any:
    """Records as a pandas.DataFrame; whole numbers stay such where some are missing.

    Raises:
        MissingPackage: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise MissingPackage("to_pandas()", "pandas") from None
    columns: dict[str, Any] = {}
    for name in columns_of(records):
        values = [number(record.get(name)) for record in records]
        kinds = {type(value) for value in values if value is not None}
        columns[name] = pandas.array(values, dtype="Int64") if kinds == {int} and None in values else values
    return pandas.DataFrame(columns)


def _one_line(cell: str) -> str:
    return " ".join(cell.split())
