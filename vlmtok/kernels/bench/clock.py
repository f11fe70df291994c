"""How long a call takes, what it holds at its peak, and the rates of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...timing import captured
from .floors import Rates

Call = Callable[[], Any]


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
    """Copy bandwidth, matmul (half precision; fp32 on a processor) and an empty launch of this machine."""
    if not clock.gpu:
        return _rates_of_a_processor(clock)
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


def _rates_of_a_processor(clock: Clock) -> Rates:
    """The same of the CPU, on what its caches do not hold; a launch is the dispatch of a small op."""
    size, side = 1 << 26, 512
    one, two = (torch.zeros(size, dtype=torch.int8) for _ in range(2))
    x, tiny = torch.randn(side, side), torch.zeros(1)
    copy = 2 * size / (1e-6 * clock.time(lambda: two.copy_(one)).median)
    product = 2 * side**3 / (1e-6 * clock.time(lambda: x @ x).median)
    return Rates("measured on a CPU", copy, product, 1e-6 * clock.time(lambda: tiny.add_(1)).median)
