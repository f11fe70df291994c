"""The outcome of a self-test, as data and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .facts import BROKEN, NAMES, OK, REFUSED, Row

MARKS = {OK: "ok", REFUSED: "refused", BROKEN: "BROKEN"}
STYLES = {OK: "green", REFUSED: "yellow", BROKEN: "bold red"}

LEGEND = (
    "bare: the host alone; neutral: a method that cuts nothing changes no bit; tower, input, layer, text: a cut there "
    "equals its oracle; generate: with cuts, a cache changes nothing"
)


@dataclass(frozen=True)
class Report:
    """What `vlmtok doctor` found; print it with rich, or take `to_dict`.

    Attributes:
        versions: by package; None where it is not installed.
        machine: the best device here, the system, and the device that the rows ran on.
        kernels: mode, path on the best device, and why.
        rows: in the order of the table.
        seconds: that all took.
    """

    versions: dict[str, str | None]
    machine: dict[str, Any]
    kernels: dict[str, str]
    rows: tuple[Row, ...]
    seconds: float

    @property
    def broken(self) -> tuple[Row, ...]:
        """Rows with a fact that does not hold."""
        return tuple(row for row in self.rows if row.status == BROKEN)

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.broken

    def counts(self) -> dict[str, int]:
        """Rows by status."""
        return {status: sum(row.status == status for row in self.rows) for status in (OK, REFUSED, BROKEN)}

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        return {
            "ok": self.ok,
            "counts": self.counts(),
            "versions": self.versions,
            "machine": self.machine,
            "kernels": self.kernels,
            "seconds": round(self.seconds, 1),
            "rows": [row.to_dict() for row in self.rows],
        }

    # ------------------------------------------------------------------ the page
    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Versions, the table, and a line for every reason."""
        from rich.text import Text

        yield Text("  ".join(f"{name} {version or 'missing'}" for name, version in self.versions.items()))
        machine = self.machine
        gpu = "" if machine["driver"] is None else f", driver {machine['driver']}, CUDA {machine['cuda']}"
        where = f"{machine['cores']} cores; {machine['system']}; rows ran on {machine['tested_on']}"
        yield Text(f"device {machine['device']}{gpu}; {where}")
        yield Text(f"kernels {self.kernels['path']} (mode {self.kernels['mode']}): {self.kernels['why']}")
        yield self._table()
        yield Text(LEGEND, style="dim")
        for line, style in self._reasons():
            yield Text(line, style=style)
        counts = self.counts()
        said = ", ".join(f"{counts[status]} {status}" for status in (OK, REFUSED, BROKEN))
        yield Text(f"{len(self.rows)} rows: {said}; {self.seconds:.0f} s", style="bold")

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in ("", *NAMES, "result"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            status = {fact.name: fact.status for fact in row.facts}
            cells = [status.get(name, "") for name in NAMES]
            marks = [Text(MARKS.get(cell, ""), style=STYLES.get(cell, "")) for cell in (*cells, row.status)]
            table.add_row(Text(row.name), *marks)
        return table

    def _reasons(self) -> Iterator[tuple[str, str]]:
        """Lines with their style: what broke in each row, then each reason with all that it refused."""
        for row in self.rows:
            broken: dict[str, list[str]] = {}
            for fact in row.facts:
                if fact.status == BROKEN:
                    broken.setdefault(fact.why, []).append(fact.name)
            for why, facts in broken.items():
                yield f"broken: {row.name}, {', '.join(facts)}: {why}", STYLES[BROKEN]
        refused: dict[str, dict[str, list[str]]] = {}
        for row in self.rows:
            reasons = [(row.refused, "all")] if row.refused else []
            reasons += [(fact.why, fact.name) for fact in row.facts if fact.status == REFUSED]
            for why, name in reasons:
                refused.setdefault(why, {}).setdefault(name, []).append(row.name)
        for why, places in refused.items():
            where = "; ".join(f"{name} of {', '.join(rows)}" for name, rows in places.items())
            yield f"refused: {where.replace('all of ', '')}: {why}", STYLES[REFUSED]
