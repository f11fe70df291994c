"""What a run cost, gathered over its batches: means over requests, for lmms-eval's results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..forecast.budget import measure

if TYPE_CHECKING:
    from ..cost.report import Report


@dataclass
class Figures:
    """Sums over requests.

    Attributes:
        requests: answered.
        silent: of which the model ended before it said anything.
        seconds: in ``generate``.
        deciding: seconds of them in methods.
        counted: requests of which there is a sum, by figure.
        sums: over those, by figure.
    """

    requests: int = 0
    silent: int = 0
    seconds: float = 0.0
    deciding: float = 0.0
    counted: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)

    def answered(self, requests: int, silent: int, seconds: float, deciding: float) -> None:
        """Adds what a batch took."""
        self.requests += requests
        self.silent += silent
        self.seconds += seconds
        self.deciding += deciding

    def cost(self, report: Report, requests: int) -> None:
        """Adds what the books of a batch with pictures say.

        Args:
            report: of its prefill.
            requests: rows of it.
        """
        # Visual tokens are those of a row; MACs and bytes are of all rows together.
        bare, left = measure(report, "layer_average_tokens")
        self._add("visual_tokens", requests * left, requests * bare, requests)
        if report.total is not None:
            self._add("macs", report.total.after.high, report.total.before, requests)
        if report.cache is not None:
            self._add("kv_bytes", report.cache.after.high, report.cache.before, requests)

    def _add(self, name: str, after: float, bare: float, requests: int) -> None:
        for key, value in ((name, after), (f"{name}_bare", bare)):
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counted[key] = self.counted.get(key, 0) + requests

    def add(self, other: Figures) -> None:
        """Adds those of another part of the run."""
        self.answered(other.requests, other.silent, other.seconds, other.deciding)
        for name in other.sums:
            self.sums[name] = self.sums.get(name, 0.0) + other.sums[name]
            self.counted[name] = self.counted.get(name, 0) + other.counted[name]

    def metrics(self) -> dict[str, float]:
        """Means over requests, by name.

        Returns:
            ``visual_tokens`` (of a prompt, mean over the language model's layers), ``macs`` (towers, projector and
            prefill, with what deciding cost), ``kv_bytes`` (behind the prefill), each with ``_bare`` for the model
            without the method; ``pruner_time_share`` (of the time in ``generate``), ``silent_share``. What is not
            counted is left out.
        """
        made = {name: total / self.counted[name] for name, total in self.sums.items()}
        if self.requests:
            made["silent_share"] = self.silent / self.requests
        if self.seconds:
            made["pruner_time_share"] = self.deciding / self.seconds
        return made
