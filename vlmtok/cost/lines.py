"""Lines of a report as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.site import Site

TITLES = {
    "vision": "vision tower",
    "text": "text tower",
    "projector": "projector",
    "prefill": "prefill",
    "continued": "later turns",
    "signals": "signals",
    "method": "method itself",
    "decode": "decode steps",
}
"""Lines of a report, in order; signals and the methods' own cost are part of what ran, not of the model."""


class Span(NamedTuple):
    """A number, or what it lies between where it depends on content."""

    low: float
    high: float

    @property
    def fixed(self) -> bool:
        """Whether it is one number."""
        return self.low == self.high

    def map(self, change: Callable[[float], float]) -> Span:
        """Both ends changed."""
        return Span(change(self.low), change(self.high))

    def show(self, form: Callable[[float], str]) -> str:
        """As text."""
        low, high = form(self.low), form(self.high)
        return low if low == high else f"{low} .. {high}"

    def plain(self) -> Any:
        """A number, or [low, high]."""
        return self.low if self.fixed else [self.low, self.high]


@dataclass(frozen=True)
class Line:
    """A quantity, bare and compressed.

    Attributes:
        name: key of `TITLES`, or what it is.
        unit: ``MACs``, ``FLOPs`` or ``bytes``.
        before: of the bare model.
        after: as it ran.
    """

    name: str
    unit: str
    before: float
    after: Span

    @property
    def share(self) -> Span | None:
        """After by before; None where the bare model has nothing to compare with."""
        return self.after.map(lambda value: value / self.before) if self.before else None


@dataclass(frozen=True)
class LayerLine:
    """Tokens of a row in one block.

    Attributes:
        stage: ``vision``, ``text`` or ``decoder``.
        layer: 0-based block.
        before: tokens of the bare model.
        attention: tokens that enter.
        mlp: tokens of the MLP.
        visual: reducible tokens that enter,
        visual_before: and of the bare model.
        held: entries of a row that the layer's cache keeps behind the prefill; None in towers,
        held_before: and of the bare model.
    """

    stage: str
    layer: int
    before: int
    attention: Span
    mlp: Span
    visual: Span
    visual_before: float
    held: Span | None = None
    held_before: int = 0


@dataclass(frozen=True)
class SiteLine:
    """A method at one of its sites.

    Attributes:
        site: where.
        method: its spec string.
        visits: how often it was asked (by a plan: once).
        before: tokens of a row before, the last time; None where it was not asked. At ``cache`` entries of a row that
            the layer held.
        after: and after.
    """

    site: Site
    method: str
    visits: int
    before: int | None = None
    after: Span | None = None
