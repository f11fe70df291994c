"""`Report`: what a compression saved and what it cost, from the books of a run or of a plan."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import kernels
from ..core.attachment import Attachment
from ..core.ledger import StageRun
from ..core.model_shape import ModelShape, Tokens
from ..errors import ParameterError, PassError
from .conventions import convention
from .flops import Account, Profile, count_decoder, count_tower
from .lines import TITLES, LayerLine, Line, SiteLine, Span
from .overhead import overhead

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Report:
    """What a compression saved and what it cost.

    Print it, or take `to_dict`, `to_json`, `to_markdown`, `to_csv`. MACs are matrix products and convolutions, as
    torch's FlopCounterMode counts them where it sees all (docs/counting.md); FLOPs are 2 x MACs. Where a count depends
    on content, estimates give what lies between everything dropped and nothing dropped.

    Attributes:
        model: its class, or the preset.
        methods: spec strings.
        source: ``last pass``, ``all passes`` or ``estimate``.
        lines: MACs by part; signals and the methods' own cost have lines of their own.
        step: one decode step behind the prefill, or None.
        cache: bytes of the key-value cache behind the prefill, or None.
        layers: tokens by block, of the last passes.
        sites: where methods acted.
        passes: how many passes each stage has seen.
        kernels: ``"op:path"`` to the number of eager calls in this process since the compression.
        notes: what to know before trusting a figure.
        problem: why this is no report of a compression at all, or None: no method was asked, so nothing was saved.
        open: methods and sites whose counts depend on content, so that figures are ranges.
        figure: the total under the convention that was asked for, or None.
    """

    model: str
    methods: list[str]
    source: str
    lines: list[Line] = field(default_factory=list)
    step: Line | None = None
    cache: Line | None = None
    layers: list[LayerLine] = field(default_factory=list)
    sites: list[SiteLine] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None
    open: list[str] = field(default_factory=list)
    figure: Line | None = None
    _shape: ModelShape | None = field(default=None, repr=False)
    _accounts: tuple[Account, ...] = field(default=(), repr=False)
    _runs: tuple[StageRun, ...] = field(default=(), repr=False)

    # ------------------------------------------------------------------ making one
    @classmethod
    def of(cls, attachment: Attachment, model: nn.Module | None, total: bool = False) -> Report:
        """The report of a compression.

        Args:
            attachment: what `compress` put on the model.
            model: the model; it must still exist.
            total: of all passes instead of the last ones.

        Raises:
            PassError: the model no longer exists.
        """
        from ..adapters import adapter_for

        if model is None:
            raise PassError("the compressed model no longer exists; take the report while it does")
        try:
            shape = adapter_for(model).account()
        except NotImplementedError:
            shape = ModelShape(type(model).__name__, attachment.layout, notes=("the adapter does not count MACs",))
        ledger = attachment.ledger
        runs = ledger.totals() if total else [(run, 1) for run in _latest(ledger.last)]
        runs, notes = _seen(attachment, shape, runs)
        problem = None
        if not ledger.fired and not attachment.compiled:
            blind = any(run.stage == "decoder" for run, _ in runs) and not any(run.pictures for run, _ in runs)
            why = "no pass has run" if not runs else ledger.blindness if blind else "no method was asked"
            problem = f"never fired: {why}"
            notes.insert(0, problem)
        report = cls._make(attachment, shape, [runs], "all passes" if total else "last pass", notes)
        report.problem = problem
        report.passes = {**ledger.passes, **({"decode steps": ledger.steps} if ledger.steps else {})}
        report.kernels = kernels.ran(since=ledger.kernels)
        return report

    @classmethod
    def planned(
        cls,
        attachment: Attachment,
        shape: ModelShape,
        plans: Sequence[Iterable[StageRun]],
        notes: Iterable[str] = (),
        deciding: bool = True,
    ) -> Report:
        """The report of what would run.

        Args:
            attachment: methods at their sites.
            shape: the model.
            plans: the runs of one call; two plans are the bounds of what depends on content, low first.
            notes: to be shown.
            deciding: count signals and the methods' own cost.
        """
        weighted = [[(run, 1) for run in runs] for runs in plans]
        return cls._make(attachment, shape, weighted, "estimate", list(notes), deciding)

    @classmethod
    def _make(
        cls,
        attachment: Attachment,
        shape: ModelShape,
        plans: Sequence[Sequence[tuple[StageRun, int]]],
        source: str,
        notes: list[str],
        deciding: bool = True,
    ) -> Report:
        total = source == "all passes"
        accounts = []
        for runs in plans:
            account, said = _account(attachment, shape, runs, total, deciding)
            accounts.append(account)
            notes += said
        notes += _uncut(attachment, [run for runs in plans for run, _ in runs])
        report = cls(shape.name, [str(method) for method in attachment.methods], source)
        report.notes = list(dict.fromkeys([*notes, *attachment.said, *shape.notes]))
        report._shape, report._accounts = shape, tuple(accounts)
        report._runs = tuple(run for run, _ in plans[-1])
        low, high = accounts[0], accounts[-1]
        for name in TITLES:
            if name in high.lines:
                report.lines.append(_line(name, "MACs", high.lines[name][0], low.lines[name][1], high.lines[name][1]))
        if not total and high.step is not None and low.step is not None:
            report.step = _line("one decode step", "MACs", high.step[0], low.step[1], high.step[1])
        if not total and high.cache is not None and low.cache is not None:
            report.cache = _line("key-value cache", "bytes", high.cache[0], low.cache[1], high.cache[1])
        if not total:
            report.layers = list(_layers(low, high))
        report.sites = list(_sites(attachment, [[run for run, _ in runs] for runs in plans], source))
        return report

    # ------------------------------------------------------------------ figures
    @property
    def macs(self) -> Line:
        """All lines together: MACs of the model before, of the model with signals and methods after."""
        before = sum(line.before for line in self.lines)
        low, high = sum(line.after.low for line in self.lines), sum(line.after.high for line in self.lines)
        return Line("total", "MACs", before, Span(low, high))

    @property
    def flops(self) -> Line:
        """2 x MACs."""
        return _flops(self.macs)

    def line(self, name: str) -> Line:
        """A line by name.

        Raises:
            ParameterError: the report has none of that name.
        """
        for line in self.lines:
            if line.name == name:
                return line
        raise ParameterError(f"this report has no line {name!r}; lines: {', '.join(line.name for line in self.lines)}")

    def by(self, name: str) -> Line:
        """The pass as a paper would count it.

        Args:
            name: of a convention, see `vlmtok.cost.conventions.CONVENTIONS`.

        Returns:
            Before and after, in the unit that the convention prints.

        Raises:
            ParameterError: no such convention, or it covers a stage that did not run.
        """
        found = convention(name)
        if self._shape is None or not self._accounts:
            raise ParameterError("this report holds no pass")
        missing = [stage for stage in found.stages if any(stage not in a.profiles for a in self._accounts)]
        if missing:
            raise ParameterError(
                f"convention {name!r} counts {' and '.join(found.stages)}, and this report has no pass through "
                f"{' and '.join(missing)}"
            )
        shape, ends = self._shape, (self._accounts[0], self._accounts[-1])
        bare = found.count(shape, {stage: pair[0] for stage, pair in ends[1].profiles.items()})
        low, high = (found.count(shape, {s: pair[1] for s, pair in a.profiles.items()}) for a in ends)
        return Line(name, found.unit, bare, Span(low, high))

    def visual(self, stage: str) -> tuple[float, float]:
        """Reducible tokens of a row that entered a stage, and that its last block left (the most, where it depends)."""
        bare, after = self._accounts[-1].profiles[stage]
        gone = after.layers[-1].queries - after.left
        return bare.layers[0].visual, after.layers[-1].visual - gone

    # ------------------------------------------------------------------ forms
    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts; a number that depends on content is [low, high]."""

        def line(item: Line | None) -> dict[str, Any] | None:
            if item is None:
                return None
            made = {"unit": item.unit, "before": item.before, "after": item.after.plain()}
            return made if item.share is None else {**made, "share": item.share.plain()}

        return {
            "model": self.model,
            "methods": self.methods,
            "source": self.source,
            "macs": {item.name: line(item) for item in self.lines},
            "flops": {item.name: line(_flops(item)) for item in self.lines},
            "total_macs": line(self.macs),
            "total_flops": line(self.flops),
            "decode_step_macs": line(self.step),
            "decode_step_flops": None if self.step is None else line(_flops(self.step)),
            "cache_bytes": line(self.cache),
            "figure": None if self.figure is None else {"convention": self.figure.name, **(line(self.figure) or {})},
            "layers": [
                {
                    "stage": item.stage,
                    "layer": item.layer,
                    "before": item.before,
                    "attention": item.attention.plain(),
                    "mlp": item.mlp.plain(),
                    "visual": item.visual.plain(),
                }
                for item in self.layers
            ],
            "sites": [
                {
                    "site": str(item.site),
                    "method": item.method,
                    "visits": item.visits,
                    "before": item.before,
                    "after": None if item.after is None else item.after.plain(),
                }
                for item in self.sites
            ],
            "passes": self.passes,
            "kernels": self.kernels,
            "problem": self.problem,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self) -> str:
        """Every line and layer as a row: kind, name, layer, unit, before, after_low, after_high."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["kind", "name", "layer", "unit", "before", "after_low", "after_high"])
        if self.problem is not None:
            writer.writerow(["problem", self.problem, "", "", "", "", ""])
        for _, item in self._counted():
            for line in (item, _flops(item)):
                writer.writerow(["cost", line.name, "", line.unit, line.before, line.after.low, line.after.high])
        for item in self._others():
            kind = "cache" if item.unit == "bytes" else "convention"
            writer.writerow([kind, item.name, "", item.unit, item.before, item.after.low, item.after.high])
        for row in self.layers:
            for name, value in (("attention", row.attention), ("mlp", row.mlp), ("visual", row.visual)):
                kind = f"{row.stage} {name}"
                writer.writerow(["tokens", kind, row.layer, "tokens", row.before, value.low, value.high])
        return out.getvalue()

    def to_markdown(self) -> str:
        """The tables in Markdown."""
        parts = [f"**{self._title()}**", *([f"**error: {self.problem}**"] if self.problem is not None else [])]
        for headers, rows in self._tables():
            text = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
            text += ["| " + " | ".join(row) + " |" for row in rows]
            parts.append("\n".join(text))
        parts += [f"- {note}" for note in self._footnotes()]
        return "\n\n".join(parts) + "\n"

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The tables for a rich console."""
        from rich.table import Table
        from rich.text import Text

        yield Text(self._title(), style="bold")
        if self.problem is not None:
            yield Text(f"error: {self.problem}", style="bold red")
        for headers, rows in self._tables():
            table = Table()
            for index, header in enumerate(headers):
                table.add_column(header, justify="left" if index == 0 or not _numeric(rows, index) else "right")
            for row in rows:
                table.add_row(*row)
            yield table
        for note in self._footnotes():
            yield Text(f"- {note}")

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    # ------------------------------------------------------------------ tables
    def _title(self) -> str:
        counted = ", ".join(f"{count} x {stage}" for stage, count in self.passes.items())
        of = "of " if self.source == "last pass" and max(self.passes.values(), default=1) > 1 else ""
        return f"{' + '.join(self.methods)} on {self.model}: {self.source}" + (f" ({of}{counted})" if counted else "")

    def _footnotes(self) -> Iterator[str]:
        """Notes, then the paths that the kernels took."""
        yield from (note for note in self.notes if note != self.problem)
        if self.kernels:
            calls = [f"{name.replace(':', ' on ')} ({count})" for name, count in sorted(self.kernels.items())]
            yield f"kernels: {', '.join(calls)}"

    def _counted(self) -> Iterator[tuple[str, Line]]:
        """Lines in MACs, with what they are called."""
        for line in self.lines:
            yield TITLES[line.name], line
        if self.lines:
            yield "total", self.macs
        if self.step is not None:
            yield self.step.name, self.step

    def _others(self) -> Iterator[Line]:
        """Lines in other units."""
        if self.cache is not None:
            yield self.cache
        if self.figure is not None:
            yield self.figure

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        rows = []
        for name, line in self._counted():
            twice = _flops(line)
            figures = [_si(line.before), line.after.show(_si), _si(twice.before), twice.after.show(_si)]
            rows.append([name, *figures, _share(line)])
        if rows:
            yield ["", "MACs before", "MACs after", "FLOPs before", "FLOPs after", "after / before"], rows
        rows = []
        for line in self._others():
            form = _bytes if line.unit == "bytes" else _si
            name = line.name if line.unit == "bytes" else f"{line.name} convention, {line.unit}"
            rows.append([name, form(line.before), line.after.show(form), _share(line)])
        if rows:
            yield ["", "before", "after", "after / before"], rows
        if self.layers:
            yield ["stage", "layers", "tokens before", "attention", "MLP", "visual"], list(_merged(self.layers))
        if self.sites:
            yield ["site", "method", "visits", "tokens of a row"], list(_merged_sites(self.sites))


# ---------------------------------------------------------------------- from the books
def _latest(last: dict[str, StageRun]) -> list[StageRun]:
    """The passes that belong together: those of the last prompt with pictures, or of the last one if none had any."""
    seen = "decoder" in last or not any(run.stage == "decoder" for run in last.values())
    if seen:
        return [run for name, run in last.items() if not name.startswith("pictureless")]
    return [run for name, run in last.items() if name != "vision"]


def _seen(
    attachment: Attachment, shape: ModelShape, runs: list[tuple[StageRun, int]]
) -> tuple[list[tuple[StageRun, int]], list[str]]:
    """What ran, and a plan where a compiled forward kept no books; says which."""
    notes = [
        f"a {run.stage} pass was captured into a CUDA graph; its replays run no Python and are not counted"
        for run, _ in runs
        if run.captured
    ]
    if not attachment.compiled:
        return runs, notes
    lone = shape.vision is not None and shape.language is None and all(run.stage != "vision" for run, _ in runs)
    if lone:
        runs = [*runs, (_planned(attachment, shape), 1)]
    what = "the figures are those planned for one picture" if lone else "only passes outside of it are counted"
    return runs, [*notes, f"the forward ran compiled, where no books are kept; {what}"]


def _planned(attachment: Attachment, shape: ModelShape) -> StageRun:
    from .host_rows import Prompt
    from .plan import Past, Planner

    assert shape.vision is not None
    return Planner(attachment, shape, Prompt(), Past()).vision(StageRun("vision", 1, shape.vision.tokens))


def _account(
    attachment: Attachment, shape: ModelShape, runs: Iterable[tuple[StageRun, int]], total: bool, deciding: bool
) -> tuple[Account, list[str]]:
    account = Account()
    notes: list[str] = []
    signals = own = 0
    for run, times in runs:
        if run.stage == "vision" and shape.vision is not None:
            count_tower(account, run, shape.vision, shape.projector, times)
        elif run.stage == "text" and shape.text is not None:
            count_tower(account, run, shape.text, (), times)
        elif run.stage == "decoder" and shape.language is not None:
            count_decoder(account, run, shape.language, times)
        else:
            continue
        if deciding:
            cost = overhead(attachment, shape, run)
            signals, own = signals + times * cost.signals, own + times * cost.own
            notes += cost.notes
    if account.lines and deciding:
        account.add("signals", 0, signals)
        account.add("method", 0, own)
    if total and account.stepped:
        account.add("decode", *account.steps)
    return account, notes


def _line(name: str, unit: str, before: float, low: float, high: float) -> Line:
    return Line(name, unit, before, Span(min(low, high), max(low, high)))


def _flops(line: Line) -> Line:
    return Line(line.name, "FLOPs", 2 * line.before, line.after.map(lambda value: 2 * value))


def _layers(low: Account, high: Account) -> Iterator[LayerLine]:
    for stage, (bare, most) in high.profiles.items():
        least: Profile = low.profiles[stage][1]
        for layer, (before, a, b) in enumerate(zip(bare.layers, least.layers, most.layers)):

            def span(pick: Callable[[Tokens], float], a: Tokens = a, b: Tokens = b) -> Span:
                return Span(min(pick(a), pick(b)), max(pick(a), pick(b)))

            yield LayerLine(
                stage,
                layer,
                before.queries,
                span(lambda tokens: tokens.queries),
                span(lambda tokens: tokens.mlp),
                span(lambda tokens: tokens.visual),
            )


def _sites(attachment: Attachment, plans: Sequence[Sequence[StageRun]], source: str) -> Iterator[SiteLine]:
    for entry in attachment.entries:
        site = entry.site
        key = (site.stage, site.layer, site.point, entry.index)
        ends = []
        for runs in plans:
            events = [e for run in runs for e in run.events if (e.stage, e.layer, e.point, e.method) == key]
            ends += [(events[-1].before, events[-1].after)] if events else []
        visits = attachment.ledger.fired.get(key, 0) if source != "estimate" else len(ends[:1])
        after = Span(min(end[1] for end in ends), max(end[1] for end in ends)) if ends else None
        yield SiteLine(site, str(entry.method), visits, ends[-1][0] if ends else None, after)


def _uncut(attachment: Attachment, runs: Sequence[StageRun]) -> Iterator[str]:
    """Says which methods keep so many tokens that none of their views had more."""
    for index, method in enumerate(attachment.methods):
        keep = getattr(method, "keep", None)
        events = [event for run in runs for event in run.events if event.method == index]
        seen = [group for event in events for group in event.groups]
        if not isinstance(keep, int) or not seen or any(event.ragged for event in events):
            continue
        if any(group.slots < group.n for group in seen):
            continue
        scope = next(entry.scope for entry in attachment.entries if entry.index == index)
        yield (
            f"{method.spec_name()} cut nothing: keep={keep} is a count for each {scope}, and the largest one had "
            f"{max(group.n for group in seen)} tokens; a float is a share"
        )


# ---------------------------------------------------------------------- text
def _merged(layers: Iterable[LayerLine]) -> Iterator[list[str]]:
    """Runs of blocks with equal tokens as one row."""
    run: list[LayerLine] = []
    for item in [*layers, None]:
        if run and (item is None or _tokens(item) != _tokens(run[0])):
            first, last = run[0], run[-1]
            names = str(first.layer) if first is last else f"{first.layer} - {last.layer}"
            shown = [span.show(_whole) for span in (first.attention, first.mlp, first.visual)]
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
        tokens = "never fired" if end.after is None else f"{first.before} -> {end.after.show(_whole)}"
        yield [name, first.method, str(first.visits) + (" each" if len(run) > 1 else ""), tokens]


def _alike(one: SiteLine, other: SiteLine) -> bool:
    where = (one.site.stage, one.site.point, one.method, one.visits, one.after is None)
    there = (other.site.stage, other.site.point, other.method, other.visits, other.after is None)
    return where == there and one.site.layer is not None and other.site.layer == one.site.layer + 1


def _tokens(item: LayerLine) -> tuple[Any, ...]:
    return (item.stage, item.before, item.attention, item.mlp, item.visual)


def _numeric(rows: list[list[str]], index: int) -> bool:
    return all(not row[index] or row[index][0].isdigit() for row in rows)


def _whole(value: float) -> str:
    return f"{value:g}" if value == int(value) else f"{value:.1f}"


def _share(line: Line) -> str:
    return "" if line.share is None else line.share.show(lambda value: f"{100 * value:.1f} %")


def _si(value: float) -> str:
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3f}{letter}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    for size, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.2f} {name}"
    return f"{value:g} B"
