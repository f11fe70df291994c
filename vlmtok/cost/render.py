"""A report in words: tables for a terminal, Markdown, CSV and plain text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .lines import LayerLine, SiteLine
from .report_data import ReportData, flops_of
from .units import binary, share, si, whole


def csv_text(report: ReportData) -> str:
    """Every line and layer as a row: kind, name, layer, unit, before, after_low, after_high."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "name", "layer", "unit", "before", "after_low", "after_high"])
    if report.problem is not None:
        writer.writerow(["problem", report.problem, "", "", "", "", ""])
    for _, item in report.counted():
        for line in (item, flops_of(item)):
            writer.writerow(["cost", line.name, "", line.unit, line.before, line.after.low, line.after.high])
    for item in report.others():
        kind = "cache" if item.unit == "bytes" else "convention"
        writer.writerow([kind, item.name, "", item.unit, item.before, item.after.low, item.after.high])
    for row in report.layers:
        for name, value in (("attention", row.attention), ("mlp", row.mlp), ("visual", row.visual)):
            kind = f"{row.stage} {name}"
            writer.writerow(["tokens", kind, row.layer, "tokens", row.before, value.low, value.high])
    return out.getvalue()


def markdown(report: ReportData) -> str:
    """The tables in Markdown."""
    parts = [f"**{_title(report)}**", *([f"**error: {report.problem}**"] if report.problem is not None else [])]
    for headers, rows in _tables(report):
        text = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
        text += ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join(text))
    parts += [f"- {note}" for note in _footnotes(report)]
    return "\n\n".join(parts) + "\n"


def rich_tables(report: ReportData) -> Iterator[Any]:
    """The tables for a rich console."""
    from rich.table import Table
    from rich.text import Text

    yield Text(_title(report), style="bold")
    if report.problem is not None:
        yield Text(f"error: {report.problem}", style="bold red")
    for headers, rows in _tables(report):
        table = Table()
        for index, header in enumerate(headers):
            table.add_column(header, justify="left" if index == 0 or not _numeric(rows, index) else "right")
        for row in rows:
            table.add_row(*row)
        yield table
    for note in _footnotes(report):
        yield Text(f"- {note}")


def plain_text(report: ReportData) -> str:
    """The tables as text, 120 columns wide."""
    from rich.console import Console, Group

    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(Group(*rich_tables(report)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _title(report: ReportData) -> str:
    """Methods, model and where the figures come from."""
    counted = ", ".join(f"{count} x {stage}" for stage, count in report.passes.items())
    of = "of " if report.source == "last pass" and max(report.passes.values(), default=1) > 1 else ""
    return f"{' + '.join(report.methods)} on {report.model}: {report.source}" + (f" ({of}{counted})" if counted else "")


def _footnotes(report: ReportData) -> Iterator[str]:
    """Notes, then the paths that the kernels took."""
    yield from (note for note in report.notes if note != report.problem)
    if report.kernels:
        calls = [f"{name.replace(':', ' on ')} ({count})" for name, count in sorted(report.kernels.items())]
        yield f"kernels: {', '.join(calls)}"


def _tables(report: ReportData) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Headers and rows of each table that has any."""
    rows = []
    for name, line in report.counted():
        twice = flops_of(line)
        figures = [si(line.before), line.after.show(si), si(twice.before), twice.after.show(si)]
        rows.append([name, *figures, share(line)])
    if rows:
        yield ["", "MACs before", "MACs after", "FLOPs before", "FLOPs after", "after / before"], rows
    rows = []
    for line in report.others():
        form = binary if line.unit == "bytes" else si
        name = line.name if line.unit == "bytes" else f"{line.name} convention, {line.unit}"
        rows.append([name, form(line.before), line.after.show(form), share(line)])
    if rows:
        yield ["", "before", "after", "after / before"], rows
    if report.layers:
        yield ["stage", "layers", "tokens before", "attention", "MLP", "visual"], list(_merged(report.layers))
    if report.sites:
        yield ["site", "method", "visits", "tokens of a row"], list(_merged_sites(report.sites))


def _merged(layers: Iterable[LayerLine]) -> Iterator[list[str]]:
    """Runs of blocks with equal tokens as one row."""
    run: list[LayerLine] = []
    for item in [*layers, None]:
        if run and (item is None or _tokens(item) != _tokens(run[0])):
            first, last = run[0], run[-1]
            names = str(first.layer) if first is last else f"{first.layer} - {last.layer}"
            shown = [span.show(whole) for span in (first.attention, first.mlp, first.visual)]
            yield [first.stage, names, str(first.before), *shown]
            run = []
        if item is not None:
            run.append(item)


def _merged_sites(sites: Sequence[SiteLine]) -> Iterator[list[str]]:
    """Runs of layers in which a method does the same as one row."""
    runs: list[list[SiteLine]] = []
    for item in sites:
        last = runs[-1][-1] if runs else None
        if last is not None and _alike(last, item):
            runs[-1].append(item)
        else:
            runs.append([item])
    for run in runs:
        first, end = run[0], run[-1]
        name = str(first.site)
        if len(run) > 1:
            name = f"{first.site.stage} layers {first.site.layer} - {end.site.layer} {first.site.point}"
        tokens = "never fired" if end.after is None else f"{first.before} -> {end.after.show(whole)}"
        yield [name, first.method, str(first.visits) + (" each" if len(run) > 1 else ""), tokens]


def _alike(one: SiteLine, other: SiteLine) -> bool:
    where = (one.site.stage, one.site.point, one.method, one.visits, one.after is None)
    there = (other.site.stage, other.site.point, other.method, other.visits, other.after is None)
    return where == there and one.site.layer is not None and other.site.layer == one.site.layer + 1


def _tokens(item: LayerLine) -> tuple[Any, ...]:
    return (item.stage, item.before, item.attention, item.mlp, item.visual)


def _numeric(rows: list[list[str]], index: int) -> bool:
    return all(not row[index] or row[index][0].isdigit() for row in rows)
