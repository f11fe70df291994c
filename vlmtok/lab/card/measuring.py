"""Measures the parts, on whatever is found, and writes their rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import ParameterError
from ...kernels.bench.cases import cases, without_case
from ...kernels.bench.clock import Clock, measure_rates
from ...kernels.bench.measuring import MEASURED, ON_A_CPU, measure_cases
from ...kernels.bench.modelling import NOT_MEASURED, modelled
from ...loading.problems import quiet
from ...timing import Progress, device_name, tell, write_json_rows
from ..suite import run_suite
from ..suite_modelled import model_suite
from ..suite_models import FULL, TINY, Row, Sizes
from .launches import tower_launches
from .page import PARTS, left_out, write_page
from .roofline import need_matplotlib


@dataclass(frozen=True)
class Found:
    """What a measurement wrote.

    Attributes:
        files: rows, page and plot.
        status: where the figures of each part are from, as its rows say too: ``"measured"``, ``"measured on a CPU"``,
            ``"modelled, not measured"``, for launches of no GPU how they were counted; empty if there are none.
        policies: the one of them that holds dispatch thresholds, for the environment variable ``VLMTOK_POLICIES``;
            None without figures of a GPU at full sizes.
    """

    files: list[Path]
    status: dict[str, str]
    policies: Path | None


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
    def slug(self) -> str:
        """The card, as the names of files end."""
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
    """Measures a card and writes rows, a page, a plot and dispatch thresholds.

    Args:
        folder: where files go: a ``PART_CARD.json`` a part, ``card_CARD.md``, ``roofline_CARD.svg`` and, of a GPU,
            ``policies_CARD.json``. The page holds every part that lies there, those of earlier runs on the card too.
        device: what is measured. On a CPU nothing is, unless `tiny`: floors and promises are modelled for an H200.
        tiny: small sizes, to see that it runs; figures are marked as those of a CPU where it is one.
        parts: of `PARTS`.
        rounds: how often each model is timed.
        limit: seconds for each group of models that take turns, after which no further round begins.
        repeats: timings of an op.
        compiled: whether ops are timed under torch.compile too.
        progress: told of each step.

    Returns:
        The files written.

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
    written, status = [], {}
    for part in (part for part in PARTS if part in parts):
        path = folder / f"{part}_{run.slug}.json"
        rows: list[Row] = []
        for found in _MEASURE[part](run):
            rows += found
            write_json_rows(path, rows)  # what is measured is kept if the rest is stopped
        written.append(path)
        status[part] = "; ".join(dict.fromkeys(row["status"] for row in rows if not left_out(row)))
    pages, policies = write_page(folder, run.slug, tiny)
    return Found([*written, *pages], status, policies)


def _kernels(run: _Run) -> Iterator[list[Row]]:
    """Every op beside its definition, compiled and not, and beside the rivals that are installed."""
    chosen = cases(small=run.tiny)
    dtype = torch.float32 if run.device is not None and run.device.type == "cpu" else torch.bfloat16
    without = [{"op": op, "status": f"left out: {why}"} for op, why in without_case().items()]
    if run.device is None:
        yield [*modelled(chosen, dtype), *without]
        return
    clock = Clock(run.device, run.repeats)
    for done, (case, rows) in enumerate(measure_cases(chosen, clock, measure_rates(clock), dtype, run.compiled)):
        tell(run.progress, f"measured {case.op}", done + 1, len(chosen))
        yield rows
    yield without


def _launches(run: _Run) -> Iterator[list[Row]]:
    """What a tower launches, bare and compressed."""
    with quiet():
        yield tower_launches(run.sizes, run.device, run.progress)


def _models(run: _Run) -> Iterator[list[Row]]:
    """The standard suite: towers and language models, bare and compressed."""
    if run.device is None:
        yield [{**row, "status": NOT_MEASURED} for row in model_suite(run.progress)]
        return
    lost: list[str] = []
    rows = run_suite(run.device, sizes=run.sizes, rounds=run.rounds, limit=run.limit, progress=run.progress, lost=lost)
    status = MEASURED if run.device.type == "cuda" else ON_A_CPU
    yield [{**row, "status": status} for row in rows]
    yield [{"model": name, "status": "not measured: out of memory"} for name in lost]


_MEASURE: dict[str, Callable[[_Run], Iterator[list[Row]]]] = {
    "kernels": _kernels,
    "launches": _launches,
    "models": _models,
}
