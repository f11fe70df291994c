"""What a `Report` holds, and the arithmetic on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..core.ledger import StageRun
from ..core.model_shape import ModelShape
from ..errors import NotCounted, ParameterError
from .conventions import convention
from .flops import Account
from .lines import TITLES, LayerLine, Line, SiteLine, Span


@dataclass
class ReportData:
    """The fields of a `Report`, whose docstring says what they mean."""

    model: str
    methods: list[str]
    source: str
    lines: list[Line] = field(default_factory=list)
    step: Line | None = None
    cache: Line | None = None
    peak: Line | None = None
    layers: list[LayerLine] = field(default_factory=list)
    sites: list[SiteLine] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None
    settings: list[dict[str, Any]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    figure: Line | None = None
    missing: list[str] = field(default_factory=list)
    _shape: ModelShape | None = field(default=None, repr=False)
    _accounts: tuple[Account, ...] = field(default=(), repr=False)
    _runs: tuple[StageRun, ...] = field(default=(), repr=False)

    @property
    def reduced(self) -> bool:
        """Whether anything was left out: tokens at a site, or work of a layer for tokens that stay."""
        visits = [(site.before, site.after) for site in self.sites]
        cut = any(a is not None and b is not None and a.low < b for b, a in visits)
        return cut or any(run.skips for run in self._runs)

    @property
    def evicts(self) -> bool:
        """Whether entries leave the key-value cache, or a method was put where they can."""
        asked = any(site.site.stage == "cache" for site in self.sites)
        return asked or (self.cache is not None and self.peak is not None and self.cache.after != self.peak.after)

    @property
    def total(self) -> Line | None:
        """All lines together: MACs of the model before, of the model with signals and methods after.

        Twice as many are what torch's FlopCounterMode says under math or eager attention. Fused attention counts as
        nothing on a CPU before torch 2.15, and by its shapes alone on a GPU; a causal half counts in full everywhere.

        None where something that ran is not counted (`missing` says what), since a part is no total.
        """
        if self.missing:
            return None
        before = sum(line.before for line in self.lines)
        low, high = sum(line.after.low for line in self.lines), sum(line.after.high for line in self.lines)
        return Line("total", "MACs", before, Span(low, high))

    @property
    def macs(self) -> Line:
        """`total`.

        Raises:
            NotCounted: something that ran is not counted; `lines` has what is.
        """
        if self.total is None:
            raise NotCounted(f"no total for {self.model}: {'; '.join(self.missing)}. `lines` has what is counted")
        return self.total

    @property
    def flops(self) -> Line:
        """2 x MACs.

        Raises:
            NotCounted: as `macs`.
        """
        return flops_of(self.macs)

    def line(self, name: str) -> Line:
        """A line by name.

        Raises:
            ParameterError: the report has none of that name.
        """
        for line in self.lines:
            if line.name == name:
                return line
        raise ParameterError(f"this report has no line {name!r}; lines: {', '.join(line.name for line in self.lines)}")

    def by(self, name: str) -> Line:
        """The pass as a paper would count it.

        Args:
            name: of a convention, see `vlmtok.cost.conventions.CONVENTIONS`.

        Returns:
            Before and after, in the unit that the convention prints.

        Raises:
            ParameterError: no such convention, it covers a stage that did not run, or its formula does not hold for
                layers of this form.
            NotCounted: it covers a stage that is not counted, or a tower with attention of another kind.
        """
        found = convention(name)
        if self._shape is None or not self._accounts:
            raise ParameterError("this report holds no pass")
        missing = [stage for stage in found.stages if any(stage not in a.profiles for a in self._accounts)]
        if missing and self.missing:
            raise NotCounted(f"convention {name!r} counts {' and '.join(found.stages)}: {'; '.join(self.missing)}")
        if "vision" in found.stages and self._shape.packed is not None:
            raise NotCounted(
                f"convention {name!r} counts a vision tower as rows of one picture, and that of {self.model} packs "
                "pictures of any size, pads them or splits them into windows"
            )
        if missing:
            raise ParameterError(
                f"convention {name!r} counts {' and '.join(found.stages)}, and this report has no pass through "
                f"{' and '.join(missing)}"
            )
        found.check(self._shape)
        shape, ends = self._shape, (self._accounts[0], self._accounts[-1])
        bare = found.count(shape, {stage: pair[0] for stage, pair in ends[1].profiles.items()})
        low, high = (found.count(shape, {s: pair[1] for s, pair in a.profiles.items()}) for a in ends)
        return Line(name, found.unit, bare, Span(low, high))

    def visual(self, stage: str) -> tuple[float, float]:
        """Reducible tokens of a row that entered a stage, and that its last block left (the most, where it depends)."""
        bare, after = self._accounts[-1].profiles[stage]
        gone = after.layers[-1].queries - after.left
        return bare.layers[0].visual, after.layers[-1].visual - gone

    def last_layers(self) -> list[LayerLine]:
        """Lines of the language model's layers; of the first tower where none are counted."""
        stages = [line.stage for line in self.layers]
        last = "decoder" if "decoder" in stages else next(iter(stages), None)
        return [line for line in self.layers if line.stage == last]

    def counted(self) -> Iterator[tuple[str, Line]]:
        """Lines in MACs, with what they are called."""
        for line in self.lines:
            yield TITLES[line.name], line
        if self.lines and self.total is not None:
            yield "total", self.total
        if self.step is not None:
            yield self.step.name, self.step

    def others(self) -> Iterator[Line]:
        """Lines in other units."""
        if self.cache is not None:
            yield self.cache
        if self.peak is not None and self.evicts:
            yield self.peak
        if self.figure is not None:
            yield self.figure


def flops_of(line: Line) -> Line:
    """A line in MACs as FLOPs: 2 x."""
    return Line(line.name, "FLOPs", 2 * line.before, line.after.map(lambda value: 2 * value))
