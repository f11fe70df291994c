"""A report put together from the books: what a ledger recorded, or what a plan says would run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, TypeVar

from .. import kernels
from ..core.attachment import Attachment
from ..core.ledger import Event, Ledger, StageRun
from ..core.model_shape import ModelShape, Tokens, Uncounted
from ..core.site import Site
from ..errors import PassError
from .flops import Account, Profile, count_decoder, count_tower
from .lines import TITLES, LayerLine, Line, SiteLine, Span
from .overhead import overhead
from .packed import count_packed
from .report_data import ReportData

if TYPE_CHECKING:
    from torch import nn

R = TypeVar("R", bound=ReportData)


def report_of_passes(made: type[R], attachment: Attachment, model: nn.Module | None, total: bool) -> R:
    """`Report.of`; `made` is the class of the report."""
    from ..adapters import adapter_for

    if model is None:
        raise PassError("the compressed model no longer exists; take the report while it does")
    try:
        shape = adapter_for(model).account()
    except NotImplementedError:
        nothing = Uncounted("the adapter does not count MACs")
        shape = ModelShape(type(model).__name__, attachment.layout, uncounted=(nothing,))
    ledger = attachment.ledger
    runs = ledger.totals() if total else [(run, 1) for run in _latest(ledger)]
    for run, _ in runs:
        run.read()
    runs, notes = _seen(attachment, shape, runs)
    problem = None
    if not ledger.fired and not attachment.compiled:
        blind = any(run.stage == "decoder" for run, _ in runs) and not any(run.pictures for run, _ in runs)
        why = "no pass has run" if not runs else ledger.blindness if blind else "no method was asked"
        problem = f"never fired: {why}"
        notes.insert(0, problem)
    missing = [one.what for one in shape.uncounted if not one.path or one.path in ledger.uncounted]
    report = _report(made, attachment, shape, [runs], "all passes" if total else "last pass", notes, missing)
    report.problem = problem
    report.passes = {**ledger.passes, **({"decode steps": ledger.steps} if ledger.steps else {})}
    report.kernels = kernels.ran(since=ledger.kernels)
    return report


def report_of_plans(
    made: type[R],
    attachment: Attachment,
    shape: ModelShape,
    plans: Sequence[Iterable[StageRun]],
    notes: Iterable[str],
    deciding: bool,
) -> R:
    """`Report.planned`; `made` is the class of the report."""
    weighted = [[(run, 1) for run in runs] for runs in plans]
    missing = [one.what for one in shape.uncounted if not one.apart]
    return _report(made, attachment, shape, weighted, "estimate", list(notes), missing, deciding)


def _report(
    made: type[R],
    attachment: Attachment,
    shape: ModelShape,
    plans: Sequence[Sequence[tuple[StageRun, int]]],
    source: str,
    notes: list[str],
    missing: list[str],
    deciding: bool = True,
) -> R:
    """A report of runs, each counted so many times; two plans are the bounds of what depends on content.

    `missing` is what belongs to them and is not counted.
    """
    total = source == "all passes"
    accounts = []
    for runs in plans:
        account, said = _account(attachment, shape, runs, total, deciding)
        accounts.append(account)
        missing += account.missing
        notes += said
    notes += uncut(attachment, [run for runs in plans for run, _ in runs])
    report = made(shape.name, [str(method) for method in attachment.methods], source)
    report.settings = [method.settings() if is_dataclass(method) else {} for method in attachment.methods]
    report.missing = list(dict.fromkeys(missing))
    uncounted = [one.what for one in shape.uncounted]
    report.notes = list(dict.fromkeys([*notes, *attachment.said, *shape.notes, *uncounted, *report.missing]))
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
    if not total and high.peak is not None and low.peak is not None:
        report.peak = _line("key-value cache, peak", "bytes", high.peak[0], low.peak[1], high.peak[1])
    if not total:
        report.layers = list(_layers(low, high))
    report.sites = list(_sites(attachment, [[run for run, _ in runs] for runs in plans], source))
    return report


def _latest(ledger: Ledger) -> list[StageRun]:
    """The passes that belong together: those of the last prompt with pictures, or of the last one if none had any."""
    last = ledger.last
    seen = "decoder" in last or not any(run.stage == "decoder" for run in last.values())
    if not seen:
        return [run for name, run in last.items() if name != "vision"]
    earlier = [ledger.earlier] if ledger.earlier is not None and "vision" in last else []
    return [*earlier, *(run for name, run in last.items() if not name.startswith("pictureless"))]


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
    from .past import Past
    from .plan import Planner
    from .planned_rows import Prompt

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
        elif run.stage == "vision" and shape.packed is not None:
            count_packed(account, run, shape.packed, shape.projector, times)
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
                before.visual,
                span(lambda tokens: tokens.held) if stage == "decoder" else None,
                before.held,
            )


def _sites(attachment: Attachment, plans: Sequence[Sequence[StageRun]], source: str) -> Iterator[SiteLine]:
    books = [[event for run in runs for event in run.events] for runs in plans]
    for entry in attachment.entries:
        site = entry.site
        asked = [_of(events, site, entry.index, forgotten=False) for events in books]
        ends = [(events[-1].before, events[-1].after) for events in asked if events]
        visits = attachment.ledger.fired.get((site.stage, site.layer, site.point, entry.index), 0)
        if source == "estimate":
            visits = len(ends[:1])
        after = Span(min(end[1] for end in ends), max(end[1] for end in ends)) if ends else None
        yield SiteLine(site, str(entry.method), visits, ends[-1][0] if ends else None, after)
    yield from _forgotten(attachment, books)


def _forgotten(attachment: Attachment, books: Sequence[Sequence[Event]]) -> Iterator[SiteLine]:
    """Caches that lost entries with tokens that a method dropped in a later layer, where nobody was asked."""
    found = {(e.method, e.layer) for events in books for e in events if e.kind == "forget" and e.layer is not None}
    for index, layer in sorted(found):
        site = Site("cache", layer)
        known = [_of(events, site, index, forgotten=True) for events in books]
        ends = [(events[0].before, events[-1].after) for events in known if events]
        after = Span(min(end[1] for end in ends), max(end[1] for end in ends))
        yield SiteLine(site, str(attachment.methods[index]), 0, ends[-1][0], after)


def _of(events: Iterable[Event], site: Site, method: int, forgotten: bool) -> list[Event]:
    """Visits of a method at a site, or what left its cache without one."""
    key = (site.stage, site.layer, site.point, method)
    found = [e for e in events if (e.stage, e.layer, e.point, e.method) == key]
    return [event for event in found if (event.kind == "forget") is forgotten]


def uncut(attachment: Attachment, runs: Sequence[StageRun]) -> Iterator[str]:
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
