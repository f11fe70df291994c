"""`Report`: what a compression saved and what it cost, from the books of a run or of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.attachment import Attachment
from ..core.ledger import StageRun
from ..core.model_shape import ModelShape
from ..tabular import Records
from . import assemble, render
from .lines import Line
from .report_data import ReportData, flops_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(repr=False)
class Report(ReportData, Records):
    """What a compression saved and what it cost.

    Print it, or take `to_dict`, `to_json`, `to_csv`, `to_pandas`, `to_markdown`, `to_latex`, `to_html`. MACs are matrix
    products and convolutions, as torch's FlopCounterMode counts them where it sees all: under math or eager attention
    (docs/counting.md). FLOPs are 2 x MACs. Where a count depends on content, estimates give what lies between
    everything dropped and nothing dropped.

    Attributes:
        model: its class, or the preset.
        methods: spec strings.
        source: ``last pass``, ``all passes`` or ``estimate``.
        lines: MACs by part; signals and the methods' own cost have lines of their own.
        step: one decode step behind the prefill, or None.
        cache: bytes of the key-value cache that stay behind the prefill, or None. Padding takes as much as entries.
        peak: bytes that it held at the end of the prefill, before entries left, or None.
        layers: tokens by block, of the last passes.
        sites: where methods acted.
        passes: how many passes each stage has seen.
        kernels: ``"op:path"`` to the number of eager calls in this process since the compression.
        notes: what to know before trusting a figure.
        problem: why this is no report of a compression at all, or None: no method was asked, so nothing was saved.
        open: methods and sites whose counts depend on content, so that figures are ranges.
        figure: the total under the convention that was asked for, or None.
        missing: what ran and is not counted; then there is no total: `total` is None, and `macs` an error.
    """

    # ------------------------------------------------------------------ making one
    @classmethod
    def of(cls, attachment: Attachment, model: nn.Module | None, total: bool = False) -> Report:
        """The report of a compression.

        Args:
            attachment: what `compress` put on the model.
            model: the model; it must still exist.
            total: of all passes instead of the last ones.

        Raises:
            PassError: the model no longer exists.
        """
        return assemble.report_of_passes(cls, attachment, model, total)

    @classmethod
    def planned(
        cls,
        attachment: Attachment,
        shape: ModelShape,
        plans: Sequence[Iterable[StageRun]],
        notes: Iterable[str] = (),
        deciding: bool = True,
    ) -> Report:
        """The report of what would run.

        Args:
            attachment: methods at their sites.
            shape: the model.
            plans: the runs of one call; two plans are the bounds of what depends on content, low first.
            notes: to be shown.
            deciding: count signals and the methods' own cost.
        """
        return assemble.report_of_plans(cls, attachment, shape, plans, notes, deciding)

    # ------------------------------------------------------------------ forms
    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts; a number that depends on content is [low, high]."""

        def line(item: Line | None) -> dict[str, Any] | None:
            if item is None:
                return None
            made = {"unit": item.unit, "before": item.before, "after": item.after.plain()}
            return made if item.share is None else {**made, "share": item.share.plain()}

        return {
            "model": self.model,
            "methods": self.methods,
            "source": self.source,
            "macs": {item.name: line(item) for item in self.lines},
            "flops": {item.name: line(flops_of(item)) for item in self.lines},
            "total_macs": line(self.total),
            "total_flops": None if self.total is None else line(flops_of(self.total)),
            "missing": self.missing,
            "decode_step_macs": line(self.step),
            "decode_step_flops": None if self.step is None else line(flops_of(self.step)),
            "cache_bytes": line(self.cache),
            "cache_peak_bytes": line(self.peak),
            "figure": None if self.figure is None else {"convention": self.figure.name, **(line(self.figure) or {})},
            "layers": [
                {
                    "stage": item.stage,
                    "layer": item.layer,
                    "before": item.before,
                    "attention": item.attention.plain(),
                    "mlp": item.mlp.plain(),
                    "visual_before": item.visual_before,
                    "visual": item.visual.plain(),
                    **({} if item.held is None else {"held_before": item.held_before, "held": item.held.plain()}),
                }
                for item in self.layers
            ],
            "sites": [
                {
                    "site": str(item.site),
                    "method": item.method,
                    "visits": item.visits,
                    "before": item.before,
                    "after": None if item.after is None else item.after.plain(),
                }
                for item in self.sites
            ],
            "passes": self.passes,
            "kernels": self.kernels,
            "problem": self.problem,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_records(self) -> list[dict[str, Any]]:
        """Every line and layer as a record: model, method, settings, source, kind, name, layer, unit, before, after."""
        return render.records(self)

    def to_markdown(self) -> str:
        """The tables in Markdown."""
        return render.markdown(self)

    def to_latex(self) -> str:
        """The tables for LaTeX, with the rules of booktabs."""
        return render.latex(self)

    def to_html(self) -> str:
        """The tables in HTML."""
        return render.html_text(self)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The tables for a rich console."""
        return render.rich_tables(self)

    def __str__(self) -> str:
        return render.plain_text(self)

    def __repr__(self) -> str:
        share = None if self.total is None else self.total.share
        if self.missing:
            left = "no total"
        elif share is None:
            left = "nothing counted"
        else:
            left = f"{share.show(lambda value: f'{100 * value:.1f} %')} of the MACs"
        return f"<Report of {' + '.join(self.methods)} on {self.model}: {left}>"
