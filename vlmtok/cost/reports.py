"""Several reports as one table: a row for each method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..tabular import Table, Tabular
from .lines import Line
from .report import Report
from .units import binary, share, si, whole


@dataclass(frozen=True, eq=False)
class Reports(Tabular):
    """Reports of one model under several methods; print it, or take one of its forms.

    Attributes:
        reports: one for each method, in order.
    """

    reports: Sequence[Report]

    def __iter__(self) -> Iterator[Report]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def to_records(self) -> list[dict[str, Any]]:
        """A record for each method: MACs and bytes, before and after; what depends on content as low and high."""
        evicts = any(report.evicts for report in self.reports)
        return [_record(report, evicts) for report in self.reports]

    def table(self) -> Table:
        """A row for each method, below one for the bare model."""
        first = self.reports[0]
        head = ["method", "visual tokens a layer", "MACs, total", "after / before"]
        head += [] if first.cache is None else [first.cache.name]
        head += [] if first.step is None else [first.step.name]
        head += [] if first.figure is None else [f"{first.figure.name} convention, {first.figure.unit}"]
        rows = [["bare", *_cells(first, before=True)]]
        rows += [["+".join(report.methods), *_cells(report)] for report in self.reports]
        return Table(head, rows)

    def __repr__(self) -> str:
        return f"<Reports of {', '.join('+'.join(report.methods) for report in self.reports)}>"


def _tokens(report: Report) -> tuple[float, float] | None:
    """Visual tokens of a row, mean over the layers of the last stage: bare, and the most that stay."""
    lines = report.last_layers()
    if not lines:
        return None
    return sum(line.visual_before for line in lines) / len(lines), sum(line.visual.high for line in lines) / len(lines)


def _cells(report: Report, before: bool = False) -> list[str]:
    tokens = _tokens(report)

    def shown(line: Line) -> str:
        form = binary if line.unit == "bytes" else si
        return form(line.before) if before else line.after.show(form)

    cells = ["" if tokens is None else whole(tokens[0] if before else tokens[1])]
    total = report.total
    cells += ["not given", ""] if total is None else [shown(total), "" if before else share(total)]
    return cells + [shown(line) for line in (report.cache, report.step, report.figure) if line is not None]


def _record(report: Report, peak: bool) -> dict[str, Any]:
    """Of one method; the cache's peak where one of the methods lets entries leave it."""
    tokens = _tokens(report)
    made: dict[str, Any] = {"model": report.model, "method": "+".join(report.methods)}
    if tokens is not None:
        made.update(visual_tokens_before=tokens[0], visual_tokens_after=tokens[1])
    named = {"total_macs": report.total, "cache_bytes": report.cache, "decode_step_macs": report.step}
    if peak:
        named["cache_peak_bytes"] = report.peak
    if report.figure is not None:
        named[f"{report.figure.name}_{report.figure.unit.lower()}"] = report.figure
    for name, line in named.items():
        if line is not None:
            made.update({f"{name}_before": line.before, f"{name}_low": line.after.low, f"{name}_high": line.after.high})
    if report.missing:
        made.update(dict.fromkeys(("total_macs_before", "total_macs_low", "total_macs_high")))
    made["missing"] = "; ".join(report.missing)
    return made
