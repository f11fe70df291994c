"""How long methods take to decide, while a compressed model runs: the part of its time that is not the model's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..compression import Compression
    from ..core.method import Method


@dataclass
class Clock:
    """Seconds that methods spent in `reduce`, with the signals that they asked for there.

    What hooks catch for signals beforehand (queries and keys of a layer), and what moves rows afterwards, is not among
    them. On a GPU events are placed around each call and read at the end, so that nothing waits while the model runs.

    Attributes:
        calls: how often a method was asked.
    """

    calls: int = 0
    _seconds: float = 0.0
    _events: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """So far; waits for a GPU."""
        while self._events:
            begin, end = self._events.pop()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    @contextmanager
    def watching(self, run: Compression) -> Iterator[Clock]:
        """Context in which the methods of a compression are timed.

        Args:
            run: the handle; its methods go back to what they were behind the context.
        """
        # An entry may hold another object than the user gave: one whose schedule was fitted to the model.
        methods = {id(entry.method): entry.method for entry in run._attachment.entries}
        for method in methods.values():
            vars(method)["reduce"] = self._timed(method)  # in front of the class's; settings are fields, not this
        try:
            yield self
        finally:
            for method in methods.values():
                vars(method).pop("reduce", None)

    def _timed(self, method: Method) -> Callable[[Any], Any]:
        reduce = method.reduce

        def timed(view: Any) -> Any:
            self.calls += 1
            if view.tokens.device.type != "cuda":
                start = time.perf_counter()
                answer = reduce(view)
                self._seconds += time.perf_counter() - start
                return answer
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            answer = reduce(view)
            end.record()
            self._events.append((begin, end))
            return answer

        return timed
