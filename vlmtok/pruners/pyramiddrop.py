"""PyramidDrop: drop a share of the visual tokens at the end of every stage of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from ..core.aliases import Alias
from ..core.between_layers import DropsBetweenLayers
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_range, check_schedule, share_of_entered
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError
from .fastv import last_row_score


def _powers(value: Any, settings: Mapping[str, Any]) -> tuple[float, ...]:
    """Shares of the stages behind the first: powers of the paper's lambda, to the last decimal that was written."""
    check_range(value, "PyramidDrop", "lambda", 0, 1)
    if value == 0:
        raise ParameterError("PyramidDrop: lambda=0 is not possible; it is the share of tokens that a cut leaves")
    layers = settings.get("layers", settings.get("layer_list"))
    cuts = len(layers) if isinstance(layers, (tuple, list)) else len(PyramidDrop.ratios)
    return tuple(float(Decimal(repr(value)) ** power) for power in range(1, cuts + 1))


@register_method
@dataclass(eq=False)
class PyramidDrop(DropsBetweenLayers):
    """Cuts the decoder into stages and keeps fewer visual tokens in each, by the attention of the last prompt token.

    The score at a cut is computed with the norm, queries and keys of the layer that comes next. All pictures of a
    prompt share one budget.

    Algorithm:
        1. The L layers fall into stages; stage i begins at layer ``i L / (stages)``, by default L/4, L/2 and 3L/4.
        2. There ``k_i = max(1, floor(ratio_i * V))`` of the V visual tokens that entered the decoder stay.
        3. ``s_n = mean_h softmax(q_last K^T / sqrt(d))_n`` over the whole row, by the layer that comes next.
        4. The k_i tokens of highest s_n stay, in their order.

    Args:
        layers: 0-based layers that are the first of a stage ("after layer 8" of the paper is layer 8 here). None
            divides the decoder into equal stages: 8, 16, 24 of 32 layers. In a decoder too short for that, stages
            that fall on one layer are one, with the last one's share.
        ratios: share of the visual tokens that entered the decoder, for each stage but the first, rounded down.
            (The paper's lambda to the power of the stage; ``lambda=0.5`` gives the default.)
        positions: ``"renumber"`` the position ids of what stays, as released, or ``"keep"`` them. None renumbers where
            the model can, and keeps them where they are places in a picture (M-RoPE).
    """

    paper = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction "
        "(CVPR 2025)"
    )
    arxiv = "2410.17247"
    code = "https://github.com/Cooperx521/PyramidDrop"
    parity = "index-exact with the released selection (pyramiddrop_*)"
    deviations = (
        "Inference only; the released training form scores by the tokens in front of every answer.",
        "Works with grouped-query attention, batches and several pictures, where the release raises or prunes the "
        "first picture only.",
        "At least one token stays; equal scores go to the lowest index; scores are fp32.",
    )
    aliases = (
        Alias("lambda", "ratios", formula="(lambda; lambda^2; ...), one for each cut", convert=_powers),
        Alias("layer_list", "layers", "the released code"),
        Alias("image_token_ratio_list", "ratios", "the released code"),
    )
    budget_parameter = "ratios"
    scope = "sample"
    joins_cuts = True

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    positions: str | None = None

    def __post_init__(self) -> None:
        check_schedule(self.layers, self.ratios, "PyramidDrop")
        check_choice(self.positions, "PyramidDrop", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The start of every stage but the first."""
        plan = self._plan(layout.stage("decoder", "PyramidDrop").depth)
        return [
            Site("decoder", layer, "start", ("last_attention",), positions=layout.positions("decoder", self.positions))
            for layer in layout.layers("decoder", list(plan), "PyramidDrop")
        ]

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """Moves `ratios` to powers with one exponent, so that (lambda, lambda^2, ...) stays of that form."""
        exponent = (1.0 - level) / max(level, 1e-9)
        return replace(self, ratios=tuple(max(ratio**exponent, 1e-9) for ratio in self.ratios))

    def fitted(self, layout: Layout) -> Method | None:
        """Its stages over the layers where tokens may leave."""
        if self.layers is not None:
            return None
        plan = self._plan(layout.stages["decoder"].room())
        return replace(self, layers=tuple(plan), ratios=tuple(plan.values()))

    def reduce(self, view: TokenView) -> Reduction | None:
        """The best tokens by the last row's attention."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        return Reduction(keep_top(last_row_score(view.signal("last_attention")), k))

    def count(self, counts: Counts) -> int:
        """The stage's share of the tokens that entered."""
        ratio = self._plan(counts.depth).get(counts.layer)
        return counts.n if ratio is None else share_of_entered(counts, ratio)

    def _plan(self, depth: int) -> dict[int, float]:
        """Layer to share."""
        if self.layers is not None:
            return dict(zip(self.layers, self.ratios))
        stages = len(self.ratios) + 1
        return {max(1, (i + 1) * depth // stages): ratio for i, ratio in enumerate(self.ratios)}
