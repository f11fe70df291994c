"""``python -m vlmtok.kernels.bench``: the kernels against torch and against what the machine allows.

With a GPU it measures; the first figures are the machine's own rates, from which the floors follow. Without one it
prints the floors that the stated rates of an H200 give, marked "not measured", and ends well. ``vlmtok bench --all``
measures this together with towers and language models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...timing import environment, write_json_rows
from ..policy import OWN, write_policies
from .cases import cases, without_case
from .clock import Clock, measure_rates
from .floors import Case
from .measuring import measure_cases
from .modelling import NOT_MEASURED, modelled
from .sweep import policies, sweep

_MODELLED = ("op", "case", "batch", "floor_us", "bound", "launches", "bytes", "flops")
_MEASURED = ("op", "case", "batch", "path", "way", "median_us", "p20_us", "p80_us", "times_eager", "times_compile",
             "floor_us", "percent_of_floor", "peak_bytes", "max_error", "agreement")  # fmt: skip
"""Columns that are printed: of floors, and of times."""


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A table of some columns, aligned."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        arguments: of the command line; None reads them from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m vlmtok.kernels.bench", description=__doc__)
    names = sorted({case.op for case in cases()})
    parser.add_argument("--ops", nargs="+", choices=names, default=names, metavar="OP", help=", ".join(names))
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, print rows for the tables")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu times the torch paths, small"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=100, help="timings of a call")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    asked = parser.parse_args(arguments)
    for op, why in without_case().items():
        print(f"{op} is left out: {why}", file=sys.stderr)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no such device here")
    dtype = getattr(torch, asked.dtype)
    chosen = [case for case in cases(small=asked.device == "cpu") if case.op in asked.ops]
    if asked.device == "auto" and not torch.cuda.is_available():
        print(f"No GPU here. Floors on an H200 from its stated rates ({NOT_MEASURED}):\n")
        rows = modelled(chosen, dtype)
        print(show(rows, _MODELLED))
        if asked.sweep:
            print("\n--sweep has nothing to time without a GPU.")
    else:
        rows = _measure_all(chosen, asked, dtype)
    if asked.json is not None:
        write_json_rows(asked.json, rows)
    return 0


def _measure_all(chosen: Sequence[Case], asked: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measures, printing as it goes."""
    device = torch.device("cpu" if asked.device == "cpu" else "cuda")
    clock = Clock(device, asked.repeats)
    rates = measure_rates(clock)
    place = environment(device)
    if clock.gpu:
        print(f"{place['device']}, driver {place['driver']}, torch {place['torch']}, triton {place['triton']}")
        print(f"copy {rates.copy:.3g} B/s, matmul {rates.product:.3g} FLOP/s, launch {1e6 * rates.launch:.3g} us\n")
    rows: list[dict[str, Any]] = []
    for case, found in measure_cases(chosen, clock, rates, dtype, not asked.no_compile):
        print(show(found, _MEASURED), "\n", flush=True)
        rows += found
        if asked.json is not None:
            write_json_rows(asked.json, rows)  # what is measured is kept if the rest is stopped
        if asked.sweep and clock.gpu:
            for spent, row in sweep(case, clock, dtype)[:5]:
                print(f"  {spent:8.2f} us  {row}")
    if clock.gpu:
        thresholds = policies(rows, asked.json.name if asked.json else "")
        print("\n".join(f"{threshold.op}: {threshold.start}" for threshold in thresholds))
        if asked.json is not None:
            write_policies(kept := asked.json.with_name(f"policies_{asked.json.name}"), thresholds)
            print(f"{OWN}={kept} takes these thresholds")
    return rows
