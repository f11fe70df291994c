"""A report in words: tables for a terminal, Markdown, HTML, LaTeX, plain text, and records for CSV and pandas."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..core.settings import format_value
from ..core.site import named, runs_of_layers
from ..tabular import Table, bullets, plain
from .lines import LayerLine, SiteLine, Span
from .report_data import ReportData, flops_of
from .units import binary, share, si, whole


def records(report: ReportData) -> list[dict[str, Any]]:
    """Every quantity as a record: what was run, then kind, name, layer, unit, before, after_low, after_high."""
    what = {
        "model": report.model,
        "method": "+".join(report.methods),
        "settings": "+".join(
            ":".join(f"{name}={format_value(value)}" for name, value in one.items()) for one in report.settings
        ),
        "source": report.source,
    }
    made: list[dict[str, Any]] = []

    def add(kind: str, name: str, layer: int | None, unit: str, before: float | None, after: Span | None) -> None:
        low, high = (None, None) if after is None else after
        made.append(
            {**what, "kind": kind, "name": name, "layer": layer, "unit": unit, "before": before}
            | {"after_low": low, "after_high": high}
        )

    if report.problem is not None:
        add("problem", report.problem, None, "", None, None)
    for _, item in report.counted():
        for line in (item, flops_of(item)):
            add("cost", line.name, None, line.unit, line.before, line.after)
    for reason in report.missing:
        add("missing", f"no total: {reason}", None, "", None, None)
    for item in report.others():
        add("cache" if item.unit == "bytes" else "convention", item.name, None, item.unit, item.before, item.after)
    for row in report.layers:
        for name, before, value in (
            ("attention", row.before, row.attention),
            ("mlp", row.before, row.mlp),
            ("visual", row.visual_before, row.visual),
        ):
            add("tokens", f"{row.stage} {name}", row.layer, "tokens", before, value)
        if row.held is not None and report.evicts:
            add("tokens", f"{row.stage} held", row.layer, "tokens", row.held_before, row.held)
    return made


def markdown(report: ReportData) -> str:
    """The tables in Markdown."""
    parts = [f"**{_title(report)}**", *([f"**error: {report.problem}**"] if report.problem is not None else [])]
    parts += [table.markdown() for table in _tables(report)]
    parts += [f"- {note}" for note in _footnotes(report)]
    return "\n\n".join(parts) + "\n"


def html_text(report: ReportData) -> str:
    """The tables in HTML, for notebooks and pages."""
    parts = [f"<p><b>{html.escape(_title(report))}</b></p>"]
    if report.problem is not None:
        mark = "border-left:4px solid #e0303a;padding-left:0.5em"  # seen on light and on dark pages
        parts.append(f'<p style="{mark}"><b>error: {html.escape(report.problem)}</b></p>')
    parts += [table.html() for table in _tables(report)]
    notes = bullets(_footnotes(report))
    return "\n".join([*parts, notes] if notes else parts)


def latex(report: ReportData) -> str:
    """The tables as ``tabular``, the title and the notes as comments."""
    said = [_title(report), *([f"error: {report.problem}"] if report.problem is not None else []), *_footnotes(report)]
    return "\n\n".join(["\n".join(f"% {line}" for line in said), *(table.latex() for table in _tables(report))]) + "\n"


def rich_tables(report: ReportData) -> Iterator[Any]:
    """The tables for a rich console."""
    from rich.text import Text

    yield Text(_title(report), style="bold")
    if report.problem is not None:
        yield Text(f"error: {report.problem}", style="bold red")
    yield from (table.rich() for table in _tables(report))
    for note in _footnotes(report):
        yield Text(f"- {note}")


def plain_text(report: ReportData) -> str:
    """The tables as text, 120 columns wide."""
    return plain(*rich_tables(report))


def _title(report: ReportData) -> str:
    """Methods, model and where the figures come from."""
    counted = ", ".join(f"{count} x {stage}" for stage, count in report.passes.items())
    of = "of " if report.source == "last pass" and max(report.passes.values(), default=1) > 1 else ""
    return f"{' + '.join(report.methods)} on {report.model}: {report.source}" + (f" ({of}{counted})" if counted else "")


def _footnotes(report: ReportData) -> Iterator[str]:
    """Why there is no total, notes, then the paths that the kernels took."""
    if report.missing and report.lines:
        yield f"total: not given, {'; '.join(report.missing)}"
    said = [report.problem, *(report.missing if report.lines else [])]
    yield from (note for note in report.notes if note not in said)
    if report.kernels:
        calls = [f"{name.replace(':', ' on ')} ({count})" for name, count in sorted(report.kernels.items())]
        yield f"kernels: {', '.join(calls)}"


def _tables(report: ReportData) -> Iterator[Table]:
    """Each table that has any rows."""
    rows = []
    for name, line in report.counted():
        twice = flops_of(line)
        figures = [si(line.before), line.after.show(si), si(twice.before), twice.after.show(si)]
        rows.append([name, *figures, share(line)])
    if rows and report.missing:
        rows.append(["total", *["not given"] * 4, ""])
    if rows:
        yield Table(["", "MACs before", "MACs after", "FLOPs before", "FLOPs after", "after / before"], rows)
    rows = []
    for line in report.others():
        form = binary if line.unit == "bytes" else si
        name = line.name if line.unit == "bytes" else f"{line.name} convention, {line.unit}"
        rows.append([name, form(line.before), line.after.show(form), share(line)])
    if rows:
        yield Table(["", "before", "after", "after / before"], rows)
    if report.layers:
        head = ["stage", "layers", "tokens before", "attention", "MLP", "visual"]
        head += ["held behind"] if report.evicts else []
        yield Table(head, list(_merged(report.layers, report.evicts)))
    if report.sites:
        yield Table(["site", "method", "visits", "tokens of a row"], list(_merged_sites(report.sites)))


def _merged(layers: Iterable[LayerLine], held: bool) -> Iterator[list[str]]:
    """Runs of blocks with equal tokens as one row, with what their caches hold where that is asked."""
    run: list[LayerLine] = []
    for item in [*layers, None]:
        if run and (item is None or _tokens(item, held) != _tokens(run[0], held)):
            first, last = run[0], run[-1]
            names = str(first.layer) if first is last else f"{first.layer} - {last.layer}"
            shown = [span.show(whole) for span in (first.attention, first.mlp, first.visual)]
            shown += ["" if first.held is None else first.held.show(whole)] if held else []
            yield [first.stage, names, str(first.before), *shown]
            run = []
        if item is not None:
            run.append(item)


def _merged_sites(sites: Sequence[SiteLine]) -> Iterator[list[str]]:
    """Runs of layers in which a method does the same as one row."""
    for run in runs_of_layers(
        sites, lambda item: item.site, lambda item: (item.method, item.visits, item.after is None)
    ):
        first, end = run[0], run[-1]
        name = named([item.site for item in run])
        tokens = "never fired" if end.after is None else f"{first.before} -> {end.after.show(whole)}"
        if first.site.stage == "cache" and end.after is not None:
            tokens = _each_cache(run)
        visits = str(first.visits) + (" each" if len(run) > 1 else "")
        if not first.visits and end.after is not None:
            visits = "none, with its cut"
        yield [name, first.method, visits, tokens]


def _each_cache(run: Sequence[SiteLine]) -> str:
    """Entries of a row that layers held and keep, from the fewest to the most: no layer's are handed to the next."""
    before = [item.before for item in run if item.before is not None]
    after = [item.after for item in run if item.after is not None]
    left = Span(min(one.low for one in after), max(one.high for one in after))
    return f"{Span(min(before), max(before)).show(whole)} -> {left.show(whole)}"


def _tokens(item: LayerLine, held: bool) -> tuple[Any, ...]:
    return (item.stage, item.before, item.attention, item.mlp, item.visual, item.held if held else None)
