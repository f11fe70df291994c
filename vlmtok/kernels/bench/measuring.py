"""``python -m vlmtok.kernels.bench``: the kernels against torch and against what the machine allows.

With a GPU it measures; the first figures are the machine's own rates, from which the floors follow. Without one it
prints the floors that the stated rates of an H200 give, marked "not measured", and ends well.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...timing import captured, environment
from .. import table
from . import floors
from ..dispatch import use
from .floors import H200, Case, Rates

Call = Callable[[], Any]
NOT_MEASURED = "modelled, not measured"


# ---------------------------------------------------------------------- clocks
@dataclass(frozen=True)
class Time:
    """Microseconds of one call: the median and the 20 and 80 % quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Time:
        """From single timings."""
        ordered = sorted(1e6 * second for second in seconds)
        return cls(*(ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.2, 0.8)))


class Clock:
    """Times calls on a GPU, with a cold or a warm L2 cache, alone or replayed from a CUDA graph; or on a processor."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        """Makes the buffer that empties the cache.

        Args:
            device: where calls run.
            repeats: timings of a call.
        """
        self.device, self.repeats = device, repeats
        self.gpu = device.type == "cuda"
        self._flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if self.gpu else None

    def time(self, call: Call, cold: bool = False) -> Time:
        """Times a call.

        Args:
            call: what runs.
            cold: empty the L2 cache before every run (a GPU's).

        Returns:
            Its time.
        """
        for _ in range(3):
            call()
        if not self.gpu:
            seconds = []
            for _ in range(self.repeats):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            return Time.of(seconds)
        marks = []
        for _ in range(self.repeats):
            if cold and self._flush is not None:
                self._flush.zero_()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            marks.append(pair)
        torch.cuda.synchronize(self.device)
        return Time.of([1e-3 * start.elapsed_time(end) for start, end in marks])

    def peak(self, call: Call) -> int | None:
        """Bytes that a call allocates at its peak, results included; None on a processor."""
        if not self.gpu:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def measure_rates(clock: Clock) -> Rates:
    """Copy bandwidth, half-precision matmul and an empty launch of this machine."""
    size = 1 << 30
    one, two = (torch.empty(size, dtype=torch.int8, device=clock.device) for _ in range(2))
    copy = 2 * size / (1e-6 * clock.time(lambda: two.copy_(one)).median)
    side = 8192
    x = torch.randn(side, side, device=clock.device, dtype=torch.bfloat16)
    product = 2 * side**3 / (1e-6 * clock.time(lambda: x @ x).median)
    tiny = torch.zeros(1, device=clock.device)
    launches = 100
    many = captured(lambda: [tiny.add_(1) for _ in range(launches)])
    return Rates("measured", copy, product, 1e-6 * clock.time(many).median / launches)


# ---------------------------------------------------------------------- rows
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
            ways = {"cold": (call, True), "warm": (call, False)}
            if clock.gpu and not case.unrolls:
                ways["warm, CUDA graph"] = (captured(call), False)
            for way, (run, cold) in ways.items() if clock.gpu else [("warm", (call, False))]:
                spent = clock.time(run, cold)
                rows.append(
                    {
                        **_size(case, dtype), "path": path, "way": way, "status": "measured",
                        "median_us": spent.median, "p20_us": spent.low, "p80_us": spent.high,
                        "floor_us": floor if clock.gpu else None,
                        "percent_of_floor": 100 * floor / spent.median if clock.gpu else None,
                        "peak_bytes": peak, **exactness,
                    }
                )  # fmt: skip
    for row in rows:
        for base in ("eager", "compile"):
            other = [r for r in rows if (r["path"], r["way"]) == (base, row["way"])]
            row[f"times_{base}"] = other[0]["median_us"] / row["median_us"] if other else None
    return rows


def _size(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"op": case.op, "case": case.what, "batch": case.batch, "dtype": str(dtype).removeprefix("torch.")}


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


def modelled(chosen: Sequence[Case], dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Floors on an H200, where there is nothing to measure on.

    Args:
        chosen: the cases.
        dtype: of the inputs.

    Returns:
        One row a case.
    """
    return [
        {
            **_size(case, dtype), "status": NOT_MEASURED, "device": "H200 (stated rates)", "driver": None,
            "floor_us": round(1e6 * case.floor(H200), 2), "bytes": case.bytes, "flops": case.flops,
            "launches": case.launches, "dependent_steps": case.chain[0],
            "bound": _bound(case), "copy_bytes_per_s": H200.copy, "flops_per_s": H200.product, "launch_s": H200.launch,
        }
        for case in chosen
    ]  # fmt: skip


def _bound(case: Case) -> str:
    """What sets the floor."""
    parts = {
        "memory": replace(case, flops=0, launches=0, chain=(0, 0)),
        "products": replace(case, bytes=0, launches=0, chain=(0, 0)),
        "launches": replace(case, bytes=0, flops=0, chain=(0, 0)),
        "dependent steps": replace(case, bytes=0, flops=0, launches=0),
    }
    return max(parts, key=lambda name: parts[name].floor(H200))


# ---------------------------------------------------------------------- sweep
def candidates(row: table.Tile) -> list[table.Tile]:
    """Rows that could take the place of a row of the tile table."""
    if row.k:
        shapes = [(m, n) for m in (16, 32, 64, 128) for n in (32, 64, 128)]
        return [replace(row, m=m, n=n, warps=w, stages=s) for m, n in shapes for w in (4, 8) for s in (2, 3, 4)]
    if row.op == "merge_rows":
        return [replace(row, m=m, n=n, warps=w) for m in (128, 512) for n in (512, 1024, 2048) for w in (2, 4, 8)]
    return [replace(row, warps=w) for w in (1, 2, 4, 8, 16, 32)]


def sweep(case: Case, clock: Clock, dtype: torch.dtype) -> list[tuple[float, table.Tile]]:
    """Times an op with other rows in the tile table.

    Args:
        case: the op and its size.
        clock: what times.
        dtype: of the inputs.

    Returns:
        (microseconds, row), the fastest first; rows that do not compile or launch are left out.
    """
    ours = case.calls(clock.device, dtype)["ours"]
    used: list[table.Tile] = []
    plain, original = table.tile, table.TILES

    def asked(op: str, width: int, size: int, rows: int = 0) -> table.Tile:
        used.append(plain(op, width, size, rows))
        return used[-1]

    results = []
    with use("triton"):
        ours()  # imports the modules
        modules = [m for n, m in sys.modules.items() if n.startswith("vlmtok.kernels.triton_") and hasattr(m, "tile")]
        try:
            for module in modules:
                module.tile = asked  # type: ignore[attr-defined]
            ours()
            for row in {row.op: row for row in used}.values():
                for other in candidates(row):
                    table.TILES = tuple(other if old == row else old for old in original)
                    try:
                        results.append((clock.time(ours).median, other))
                    except Exception as problem:
                        print(f"  {other}: {type(problem).__name__}", file=sys.stderr)
        finally:
            table.TILES = original
            for module in modules:
                module.tile = plain  # type: ignore[attr-defined]
    return sorted(results, key=lambda result: result[0])


def policies(rows: Sequence[dict[str, Any]], source: str) -> list[table.Policy]:
    """Rows for the table of `auto`: from which batch on the kernel is no slower than torch, alone and warm.

    Args:
        rows: as measured.
        source: the file they are kept in.

    Returns:
        One row an op whose kernel wins at some batch.
    """
    found = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [r for r in rows if (r["op"], r["path"], r["way"]) == (op, "triton", "warm")]
        wins = {
            batch: all(r["times_eager"] >= 1 for r in mine if r["batch"] >= batch)
            for batch in {r["batch"] for r in mine}
        }
        if any(wins.values()):
            first = mine[0]
            versions = f"torch {first['torch']}, triton {first['triton']}"
            least = min(batch for batch, won in wins.items() if won)
            found.append(table.Policy(op, least, 1 << 30, "measured", first["device"], versions, source))
    return found


# ---------------------------------------------------------------------- printing
def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A table of some columns, aligned."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


MODELLED = ("op", "case", "batch", "floor_us", "bound", "launches", "bytes", "flops")
MEASURED = ("op", "case", "batch", "path", "way", "median_us", "p20_us", "p80_us", "times_eager", "times_compile",
            "floor_us", "percent_of_floor", "peak_bytes", "max_error", "agreement")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        arguments: of the command line; None reads them from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m vlmtok.kernels.bench", description=__doc__)
    names = sorted({case.op for case in floors.cases()})
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
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no such device here")
    dtype = getattr(torch, asked.dtype)
    chosen = [case for case in floors.cases(small=asked.device == "cpu") if case.op in asked.ops]
    if asked.device == "auto" and not torch.cuda.is_available():
        print(f"No GPU here. Floors on an H200 from its stated rates ({NOT_MEASURED}):\n")
        rows = modelled(chosen, dtype)
        print(show(rows, MODELLED))
        if asked.sweep:
            print("\n--sweep has nothing to time without a GPU.")
    else:
        rows = _measure_all(chosen, asked, dtype)
    _write(rows, asked.json)
    return 0


def _write(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    if path is not None:
        path.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def _measure_all(chosen: Sequence[Case], asked: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measures, printing as it goes."""
    device = torch.device("cpu" if asked.device == "cpu" else "cuda")
    clock = Clock(device, asked.repeats)
    rates = measure_rates(clock) if clock.gpu else H200
    place = environment(device)
    if clock.gpu:
        print(f"{place['device']}, driver {place['driver']}, torch {place['torch']}, triton {place['triton']}")
        print(f"copy {rates.copy:.3g} B/s, matmul {rates.product:.3g} FLOP/s, launch {1e6 * rates.launch:.3g} us\n")
    rows: list[dict[str, Any]] = []
    for case in chosen:
        found = [{**row, **place} for row in measure(case, clock, rates, dtype, not asked.no_compile)]
        if clock.gpu:
            found = [{**row, **{f"rate_{name}": value for name, value in asdict(rates).items()}} for row in found]
        print(show(found, MEASURED), "\n", flush=True)
        rows += found
        _write(rows, asked.json)  # what is measured is kept if the rest is stopped
        if asked.sweep and clock.gpu:
            for spent, row in sweep(case, clock, dtype)[:5]:
                print(f"  {spent:8.2f} us  {row}")
    if clock.gpu:
        print("Rows for POLICIES in vlmtok/kernels/table.py:")
        for policy in policies(rows, asked.json.name if asked.json else ""):
            print(f"    {policy},")
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
