"""Measures the parts, on whatever is found, and writes their rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ParameterError
from ...kernels.bench.cases import cases, without_case
from ...kernels.bench.clock import Clock, measure_rates
from ...kernels.bench.measuring import MEASURED, ON_A_CPU, measure_cases
from ...kernels.bench.modelling import NOT_MEASURED, modelled
from ...loading.problems import quiet
from ...timing import Progress, device_name
from ..suite import run_suite
from ..suite_modelled import model_suite
from ..suite_models import FULL, TINY, Row, Sizes
from .launches import tower_launches
from .page import write_page
from .roofline import need_matplotlib

PARTS = ("kernels", "launches", "models")
"""What is measured, in this order: ops one by one with their rivals; launches of towers; towers and language models."""


@dataclass(frozen=True)
class Found:
    """What a measurement wrote.

    Attributes:
        files: rows, page and plot.
        status: where figures are from, as each row says too.
        policies: lines for `POLICIES` of vlmtok/kernels/table.py; none without figures of a GPU at full sizes.
    """

    files: list[Path]
    status: str
    policies: list[str]


@dataclass(frozen=True)
class _Run:
    """How everything is measured.

    Attributes:
        device: where; None to model.
        sizes: of the models.
        tiny: whether sizes are those of a trial.
        rounds: of models.
        limit: seconds for each group of models that take turns.
        repeats: timings of an op.
        compiled: whether torch.compile is timed.
        progress: told of each step.
    """

    device: torch.device | None
    sizes: Sizes
    tiny: bool
    rounds: int
    limit: float
    repeats: int
    compiled: bool
    progress: Progress | None

    @property
    def status(self) -> str:
        """What rows say of where their figures are from."""
        if self.device is None:
            return NOT_MEASURED
        return MEASURED if self.device.type == "cuda" else ON_A_CPU

    @property
    def slug(self) -> str:
        """The end of the names of files."""
        if self.device is None:
            return "modelled_h200"
        name = "cpu" if self.device.type == "cpu" else re.sub(r"\W+", "_", device_name(self.device).lower())
        return f"{name}_tiny" if self.tiny else name


def measure_card(
    folder: str | Path,
    device: torch.device,
    *,
    tiny: bool = False,
    parts: Sequence[str] = PARTS,
    rounds: int = 9,
    limit: float = 60.0,
    repeats: int = 100,
    compiled: bool = True,
    progress: Progress | None = None,
) -> Found:
    """Measures a card and writes rows, a page and a plot.

    Args:
        folder: where files go: a ``PART_CARD.json`` a part, ``card_CARD.md``, ``roofline_CARD.svg``. The page holds
            every part that lies there, those of earlier runs on the same card too.
        device: what is measured. On a CPU nothing is, unless `tiny`: floors and promises are modelled for an H200.
        tiny: small sizes, to see that it runs; figures are marked as those of a CPU where it is one.
        parts: of `PARTS`.
        rounds: how often each model is timed.
        limit: seconds for each group of models that take turns, after which no further round begins.
        repeats: timings of an op.
        compiled: whether ops are timed under torch.compile too.
        progress: told of each step.

    Returns:
        The files written, and lines for the dispatch table where kernels lie there.

    Raises:
        ParameterError: no such part or folder.
        MissingPackage: matplotlib is not installed.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ParameterError(f"no part {', '.join(map(repr, unknown)) or 'at all'}; one or more of {', '.join(PARTS)}")
    folder = Path(folder)
    if not folder.is_dir():
        raise ParameterError(f"no folder {str(folder)!r} to write to")
    need_matplotlib()
    chosen = device if tiny or device.type == "cuda" else None
    run = _Run(chosen, TINY if tiny else FULL, tiny, rounds, limit, repeats, compiled, progress)
    written = []
    for part in (part for part in PARTS if part in parts):
        path = folder / f"{part}_{run.slug}.json"
        rows: list[Row] = []
        for found in _MEASURE[part](run):
            rows += found
            _write(path, rows)
        written.append(path)
    pages, policies = write_page(folder, run.slug, tiny)
    return Found([*written, *pages], run.status, policies)


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def _kernels(run: _Run) -> Any:
    """Every op beside its definition, compiled and not, and beside the rivals that are installed."""
    chosen = cases(small=run.tiny)
    dtype = torch.float32 if run.device is not None and run.device.type == "cpu" else torch.bfloat16
    left_out = [{"op": op, "status": f"left out: {why}"} for op, why in without_case().items()]
    if run.device is None:
        yield [*modelled(chosen, dtype), *left_out]
        return
    clock = Clock(run.device, run.repeats)
    rates = measure_rates(clock)
    named = {f"rate_{name}": value for name, value in asdict(rates).items()}
    for done, (case, rows) in enumerate(measure_cases(chosen, clock, rates, dtype, run.compiled)):
        if run.progress is not None:
            run.progress(f"measured {case.op}", done + 1, len(chosen))
        yield [{**row, **named} for row in rows]
    yield left_out


def _launches(run: _Run) -> Any:
    with quiet():
        yield tower_launches(run.sizes, run.device, run.progress)


def _models(run: _Run) -> Any:
    if run.device is None:
        yield [{**row, "status": NOT_MEASURED} for row in model_suite(run.progress)]
        return
    lost: list[str] = []
    rows = run_suite(run.device, sizes=run.sizes, rounds=run.rounds, limit=run.limit, progress=run.progress, lost=lost)
    yield [{**row, "status": run.status} for row in rows]
    yield [{"model": name, "status": "not measured: out of memory"} for name in lost]


_MEASURE: dict[str, Callable[[_Run], Any]] = {"kernels": _kernels, "launches": _launches, "models": _models}
