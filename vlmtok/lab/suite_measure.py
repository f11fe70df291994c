"""One subject, bare and compressed, side by side: latency, memory, MACs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import kernels, timing
from ..compression import compress
from ..timing import Case, Progress, Ratio, Timing
from .suite_models import Row, Subject

if TYPE_CHECKING:
    from ..cost.report import Report


@dataclass(frozen=True)
class Peak:
    """What floors are reckoned with.

    Attributes:
        name: of the GPU.
        flops: a second, of dense bf16 matrix products.
        moved: bytes a second, of copies.
    """

    name: str
    flops: float
    moved: float


PEAK = Peak("H200", 790e12, 4.3e12)


def macs_of(report: Report, stage: str, steps: int = 0) -> tuple[float, float]:
    """MACs of a stage, bare and compressed; deciding counts for the compressed one.

    Args:
        report: of one call.
        stage: ``decode`` (one step), or what is run, joined by +: ``tower`` (all that is not a language model),
            ``prefill`` (the language model's), ``generate`` (the same with `steps` decode steps).
        steps: decode steps behind the prefill.
    """
    lines = {line.name: (line.before, line.after.high) for line in report.lines}
    step = (0.0, 0.0) if report.step is None else (report.step.before, report.step.after.high)
    if stage == "decode":
        return step
    run = stage.split(" + ")
    names = ["signals", "method"]
    names += ["vision", "text", "projector"] if "tower" in run else []
    names += ["prefill"] if run[-1] != "tower" else []
    before, after = (sum(lines[name][side] for name in names if name in lines) for side in (0, 1))
    steps = steps if run[-1] == "generate" else 0
    return before + steps * step[0], after + steps * step[1]


@dataclass(frozen=True)
class Contestant:
    """A method, and the path that its kernels take.

    Attributes:
        method: spec string.
        kernels: mode of `vlmtok.kernels.use`.
    """

    method: str
    kernels: str = "auto"

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The context in which a model is compressed."""

        @contextmanager
        def both() -> Iterator[Any]:
            with kernels.use(self.kernels), compress(model, self.method) as run:
                yield run

        return both()


def measure(
    subject: Subject,
    contestants: Sequence[Contestant],
    *,
    rounds: int = 9,
    limit: float = math.inf,
    progress: Progress | None = None,
) -> list[Row]:
    """Times a model bare and with each method, all in turns.

    Args:
        subject: the model and its calls.
        contestants: the methods.
        rounds: how often each is timed.
        limit: seconds after which no further round begins.
        progress: told after each call.

    Returns:
        A row for each stage of each contestant.
    """
    cases = [Case(f"{stage}/bare", call) for stage, call in subject.calls.items()]
    reports = []
    whole = [*subject.calls.values()][-1]
    for number, one in enumerate(contestants):
        with one.on(subject.model) as run:
            whole()
            reports.append(run.report())
        cases += [
            Case(f"{stage}/{number}", call, lambda one=one: one.on(subject.model))  # type: ignore[misc]
            for stage, call in subject.calls.items()
        ]
    peaks = {case.name: timing.peak_bytes(case, subject.device) for case in cases}
    found = timing.interleave(cases, rounds=rounds, limit=limit, device=subject.device, progress=progress)
    rows = []
    for number, (one, report) in enumerate(zip(contestants, reports)):
        for stage in subject.calls:
            rows.append(_row(subject, one, report, stage, found[f"{stage}/bare"], found[f"{stage}/{number}"]))
            rows[-1].update(peak_bytes_bare=peaks[f"{stage}/bare"], peak_bytes=peaks[f"{stage}/{number}"])
        if subject.ends is not None:
            first, last = subject.ends
            bare, short = (
                seconds_per_step(found[f"{last}/{key}"], found[f"{first}/{key}"], subject.steps - 1)
                for key in ("bare", str(number))
            )
            if bare is not None and short is not None:
                rows.append(_row(subject, one, report, "decode", bare, short))
    return rows


def measure_graphs(
    subject: Subject,
    contestants: Sequence[Contestant],
    *,
    rounds: int = 9,
    limit: float = math.inf,
    progress: Progress | None = None,
) -> list[Row]:
    """Times the last call of a subject on a GPU as CUDA graphs, bare and with each method: what the host costs is gone.

    Args:
        subject: the model and its calls.
        contestants: methods whose counts follow from shapes alone.
        rounds: how often each is timed.
        limit: seconds after which no further round begins.
        progress: told after each call.

    Returns:
        A row for each contestant; the stage says that it is a graph.
    """
    stage, call = [*subject.calls.items()][-1]
    cases, reports = [Case("bare", timing.captured(call))], []
    for number, one in enumerate(contestants):
        with one.on(subject.model) as run:
            call()
            reports.append(run.report())
            cases.append(Case(str(number), timing.captured(call)))
    found = timing.interleave(cases, rounds=rounds, limit=limit, device=subject.device, progress=progress)
    return [
        {
            **_row(subject, one, report, stage, found["bare"], found[str(number)]),
            "stage": f"{stage}, CUDA graph",
            "peak_bytes_bare": None,
            "peak_bytes": None,
        }
        for number, (one, report) in enumerate(zip(contestants, reports))
    ]


def seconds_per_step(whole: Timing, first: Timing, steps: int) -> Timing | None:
    """One step, from the whole and its beginning; None where noise is greater than a step."""
    seconds = tuple((a - b) / steps for a, b in zip(whole.seconds, first.seconds))
    return Timing(seconds) if min(seconds) > 0 else None


def _row(subject: Subject, one: Contestant, report: Report, stage: str, bare: Timing, short: Timing) -> Row:
    ratio = Ratio.of(bare, short)
    before, after = macs_of(report, stage, subject.steps - 1)
    promised = before / after if after else 1.0
    gpu = subject.device.type == "cuda"
    row = row_head(subject.name, stage, one, subject.batch, subject.tokens, report)
    row.update(
        mac_ratio=promised,
        speedup=ratio.median,
        p20=ratio.p20,
        p80=ratio.p80,
        rounds=ratio.rounds,
        of_promise=ratio.median / promised,
        # Fewer tokens do not change what weights cost: a decode step has no token count at which it pays.
        break_even_tokens=None if stage == "decode" else timing.break_even(subject.tokens, ratio.median, promised),
        break_even_from="overhead",
        seconds_bare=bare.median if gpu else None,
        seconds=short.median if gpu else None,
        measured=True,
    )
    return row


def row_head(model: str, stage: str, one: Contestant, batch: int, tokens: int, report: Report) -> Row:
    """What a row says of its case, measured or modelled."""
    cache = report.cache
    return {
        "model": model,
        "stage": stage,
        "method": one.method,
        "kernels": one.kernels,
        "batch": batch,
        "visual_tokens": tokens,
        "kv_bytes_bare": None if cache is None else cache.before,
        "kv_bytes": None if cache is None else cache.after.high,
    }
