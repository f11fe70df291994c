"""Every path of a case, timed and compared with the definition: one row a path and way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...timing import captured, environment
from ..dispatch import use
from .clock import Call, Clock
from .floors import Case, Rates

MEASURED, ON_A_CPU, NO_MEMORY = "measured", "measured on a CPU", "not measured: out of memory"
"""What a row says of where its figure is from; times of a CPU say nothing about a GPU."""
COLD, WARM, GRAPH = "cold", "warm", "warm, CUDA graph"
"""The ways in which a path is timed: whether the cache of the GPU holds its inputs, and replayed from a graph."""


def measure(case: Case, clock: Clock, rates: Rates, dtype: torch.dtype, compiled: bool = True) -> list[dict[str, Any]]:
    """Every path of one case: torch as it is, torch compiled, ours, and the rivals that are installed.

    Each is timed with a cold and with a warm cache, alone and as a CUDA graph.

    Args:
        case: the op and its size.
        clock: what times.
        rates: of the machine.
        dtype: of the inputs.
        compiled: whether torch.compile is timed.

    Returns:
        One row a path and way.
    """
    calls = case.calls(clock.device, dtype)
    versions = {rival.module: f"{rival.package} {rival.version()}" for rival in case.rivals}
    ours, definition = calls.pop("ours"), calls["eager"]
    paths: dict[str, Call] = calls
    if compiled and not case.unrolls:
        torch._dynamo.reset()
        paths["compile"] = torch.compile(definition, dynamic=False)
    if clock.gpu:
        paths["triton"] = ours
    expected = _outputs(definition())
    rows, floor = [], 1e6 * case.floor(rates)
    for path, call in paths.items():
        with use("triton" if path == "triton" else "torch"):
            exactness = _compare(_outputs(call()), expected)
            peak = clock.peak(call)
            ways = {COLD: (call, True), WARM: (call, False)} if clock.gpu else {WARM: (call, False)}
            if clock.gpu and not case.unrolls:
                ways[GRAPH] = (captured(call), False)
            for way, (run, cold) in ways.items():
                spent = clock.time(run, cold)
                rows.append(
                    {
                        **size_of(case, dtype), "path": path, "way": way, "status": MEASURED if clock.gpu else ON_A_CPU,
                        "median_us": spent.median, "p20_us": spent.low, "p80_us": spent.high,
                        "floor_us": floor if clock.gpu else None,
                        "percent_of_floor": 100 * floor / spent.median if clock.gpu else None,
                        "peak_bytes": peak, "rival": versions.get(path), "bytes": case.bytes, "flops": case.flops,
                        "launches": case.launches, **exactness,
                    }
                )  # fmt: skip
    for row in rows:
        for base in ("eager", "compile"):
            other = [r for r in rows if (r["path"], r["way"]) == (base, row["way"])]
            row[f"times_{base}"] = other[0]["median_us"] / row["median_us"] if other else None
    return rows


def measure_cases(
    chosen: Sequence[Case], clock: Clock, rates: Rates, dtype: torch.dtype, compiled: bool = True
) -> Iterator[tuple[Case, list[dict[str, Any]]]]:
    """Cases one after the other, with the machine, its versions and its rates in each row.

    Args:
        chosen: the cases.
        clock: what times.
        rates: of the machine.
        dtype: of the inputs.
        compiled: whether torch.compile is timed.

    Yields:
        A case and its rows; one row that says so where the memory of the GPU cannot hold it.
    """
    place = environment(clock.device) | {f"rate_{name}": value for name, value in asdict(rates).items()}
    for case in chosen:
        try:
            rows = measure(case, clock, rates, dtype, compiled)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows = [{**size_of(case, dtype), "path": None, "way": None, "status": NO_MEMORY}]
        yield case, [{**row, **place} for row in rows]


def size_of(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What tells a case from others in a row."""
    own = str(case.dtype or dtype).removeprefix("torch.")
    return {"op": case.op, "case": case.what, "batch": case.batch, "dtype": own}


def _outputs(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, Any]:
    """Greatest difference of the floats, and the share of the integers that agree."""
    errors = [
        float((a.float() - b.float()).nan_to_num(0.0).abs().max())
        for a, b in zip(found, expected)
        if b.is_floating_point()
    ]
    shares = [
        float((a == b).float().mean()) for a, b in zip(found, expected) if not b.is_floating_point() and b.numel()
    ]
    return {"max_error": max(errors, default=None), "agreement": min(shares, default=None)}
