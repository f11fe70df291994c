"""Measuring: cases that take turns in one process, so that whatever slows the machine down slows all of them.

A figure of speed is a ratio between cases of one run. Each round runs every case once, from another start each time;
the ratio of a round is the bare time over the case's, and what is quoted is the median of the rounds. Hooks are put on
outside the timed part, so that the bare model is really bare. Absolute times are given for a GPU only.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ParameterError
from .tabular import columns_of

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""

LEAST = 0.02
"""Seconds that a timed part lasts at least: shorter calls are repeated."""


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: of it.
        call: what is timed.
        around: makes a context that is entered before the clock starts (a compression, say).
    """

    name: str
    call: Callable[[], object]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a case, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster a case is than another one.

    Attributes:
        median: of the rounds.
        p20: 20 % of the rounds are below.
        p80: 80 % are below.
        rounds: how many.
    """

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, base: Timing, other: Timing) -> Ratio:
        """How many times faster `other` is than `base`, round by round."""
        found = sorted(a / b for a, b in zip(base.seconds, other.seconds))
        return cls(statistics.median(found), quantile(found, 0.2), quantile(found, 0.8), len(found))

    def __str__(self) -> str:
        return f"{self.median:.2f} x ({self.p20:.2f} to {self.p80:.2f})"


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value at a share of an ordered list, between neighbours linearly."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def interleave(
    cases: Sequence[Case],
    *,
    rounds: int = 9,
    warmup: int = 2,
    limit: float = math.inf,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Times cases in turns.

    Args:
        cases: what to time; the names differ.
        rounds: how often each is timed, at least 1.
        warmup: calls of each before the clock starts.
        limit: seconds after which no further round begins; one always runs.
        device: is waited for around each timed part.
        progress: told after each call.

    Returns:
        The timings by name.

    Raises:
        ParameterError: no rounds.
    """
    if isinstance(rounds, bool) or rounds < 1:
        raise ParameterError(f"rounds={rounds!r}: at least 1")
    steps, done = len(cases) * (rounds + 1), 0
    began = time.perf_counter()
    repeats = {}
    for case in cases:
        with case.around():
            for _ in range(warmup):
                once = _clock(case.call, 1, device)
        # The last warm-up call tells how long one takes.
        repeats[case.name] = max(1, min(100, math.ceil(LEAST / once))) if warmup else 1
        done += 1
        tell(progress, "warming up", done, steps)
    gc.collect()
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for round_ in range(rounds):
        if round_ and time.perf_counter() - began > limit:
            break
        first = round_ % len(cases)
        for case in (*cases[first:], *cases[:first]):
            with case.around():
                seconds[case.name].append(_clock(case.call, repeats[case.name], device))
            done += 1
            tell(progress, "measuring in turns", done, steps)
    tell(progress, "measuring in turns", steps, steps)
    return {name: Timing(tuple(found)) for name, found in seconds.items()}


def _clock(call: Callable[[], object], repeats: int, device: torch.device | str) -> float:
    """Seconds of one call, from `repeats` in a row without garbage collection."""
    with _uncollected():
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / repeats


@contextmanager
def _uncollected() -> Iterator[None]:
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def synchronize(device: torch.device | str) -> None:
    """Waits for a GPU; a CPU never lags behind."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A call as the replay of a CUDA graph: its launches without what the host does between them.

    Args:
        call: makes no decision on the host from a tensor; its inputs stay where they are.

    Returns:
        The replay. Hooks that were on the model while it was captured need not stay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(case: Case, device: torch.device | str) -> int | None:
    """Bytes that a call takes on a GPU at most, on top of what was there before; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    with case.around():
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        case.call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before


def break_even(tokens: int, speedup: float, promised: float) -> float | None:
    """Visual tokens below which a method costs more than it saves, from one measurement.

    The time above what the promise leaves is taken as a fixed cost of deciding, and the bare time as growing with the
    tokens: with bare time 1 at n tokens, the saving is 1 - 1/promised and the cost 1/speedup - 1/promised.

    Args:
        tokens: n, visual tokens that entered.
        speedup: as measured.
        promised: the ratio of MACs.

    Returns:
        The tokens; 0 where the promise is kept, None where there is nothing to save.
    """
    if promised <= 1:
        return None
    saving, cost = 1 - 1 / promised, 1 / speedup - 1 / promised
    return max(0.0, tokens * cost / saving)


def tell(progress: Progress | None, what: str, done: int, steps: int) -> None:
    """Tells of progress where somebody listens."""
    if progress is not None:
        progress(what, done, steps)


# ---------------------------------------------------------------------- where it ran
def device_name(device: torch.device | str) -> str:
    """The name of a GPU, or of the processor."""
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    if place.type == "cpu":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as table:
                names = [line.partition(":")[2].strip() for line in table if line.startswith("model name")]
        except OSError:
            names = []
        return names[0] if names else platform.processor() or platform.machine()
    return str(place)


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where a figure was measured: device, driver, threads and versions.

    Returns:
        Plain values, for a row of a table.
    """
    cuda = torch.device(device).type == "cuda"
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "transformers", "timm", "open_clip_torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    from .version import __version__

    return {
        "device": device_name(device),
        "device_type": torch.device(device).type,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "vlmtok": __version__,
        **versions,
    }


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV; columns are those of all rows, in the order in which they first appear."""
    import csv

    with open(path, "w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)


def write_json_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a JSON list, a row a line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
