"""PyramidDrop: drop a share of the visual tokens at the end of every stage of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_range
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError
from .fastv import last_row_score


def check_stages(layers: Sequence[int] | None, ratios: Sequence[float], by: str) -> None:
    """Checks a schedule of cuts inside a decoder.

    Args:
        layers: 0-based layers that run with fewer tokens than the one before, or None for a method's own.
        ratios: share of the tokens that entered the decoder, for each of them.
        by: the method's name.

    Raises:
        ParameterError: layers do not ascend or start below 1, shares lie outside (0, 1] or grow, or the two differ
            in number.
    """
    if not isinstance(ratios, (tuple, list)) or not ratios:
        raise ParameterError(f"{by}: ratios={ratios!r} must be a tuple with one share for each cut")
    for ratio in ratios:
        check_range(ratio, by, "ratios", 0, 1)
    if 0 in ratios or any(later > earlier for earlier, later in pairwise(ratios)):
        raise ParameterError(f"{by}: ratios={ratios!r} must lie in (0, 1] and never grow: tokens do not come back")
    if layers is not None:
        check_layers(layers, by, cuts=len(ratios))


def check_layers(
    layers: Sequence[int], by: str, name: str = "layers", *, cuts: int | None = None, low: int = 1
) -> None:
    """Checks the layers of a schedule.

    Args:
        layers: 0-based layers.
        by: the method's name.
        name: the parameter's name.
        cuts: how many there must be; None for any number but none.
        low: the first layer that may be named.

    Raises:
        ParameterError: not that many, not ascending, or below `low`.
    """
    if not isinstance(layers, (tuple, list)) or not layers:
        raise ParameterError(f"{by}: {name}={layers!r} must be a tuple of layers")
    if cuts is not None and len(layers) != cuts:
        raise ParameterError(f"{by}: {name}={layers!r} must name one layer for each of the {cuts} cuts")
    for layer in layers:
        check_range(layer, by, name, low, kind=int)
    if list(layers) != sorted(set(layers)):
        raise ParameterError(f"{by}: {name}={layers!r} must ascend")


def share_of_entered(counts: Counts, ratio: float) -> int:
    """How many tokens a share of those that entered the decoder leaves, rounded down as in the releases.

    Args:
        counts: the view as host ints.
        ratio: share of ``counts.entered``.

    Returns:
        Between 1 and ``counts.n`` (0 only for n = 0).
    """
    return min(counts.n, max(1, int(counts.entered * ratio)))


@register_method
@dataclass(eq=False)
class PyramidDrop(Method):
    """Cuts the decoder into stages and keeps fewer visual tokens in each, by the attention of the last prompt token.

    The score at a cut is computed with the norm, queries and keys of the layer that comes next. All pictures of a
    prompt share one budget.

    Args:
        layers: 0-based layers that are the first of a stage ("after layer 8" of the paper is layer 8 here). None
            divides the decoder into equal stages: 8, 16, 24 of 32 layers. In a decoder too short for that, stages
            that fall on one layer are one, with the last one's share.
        ratios: share of the visual tokens that entered the decoder, for each stage but the first, rounded down.
            (The paper's lambda = 0.5 to the power of the stage.)
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
    budget_parameter = "ratios"
    scope = "sample"

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    positions: str | None = None

    def __post_init__(self) -> None:
        check_stages(self.layers, self.ratios, "PyramidDrop")
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
