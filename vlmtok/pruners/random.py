"""Random: the baseline that a method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import random_subset
from ..core.settings import check_choice, check_keep, check_layer, check_range, keep_count
from ..core.site import BUDGET_SCOPES, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError


@register_method
@dataclass(eq=False)
class Random(Method):
    """Keeps tokens drawn at random, in their order: one draw for each (seed, site, N), the same for every row.

    One draw can be lucky by ten points: average over seeds where you quote it.

    Algorithm:
        1. A generator is seeded with the SHA-256 of seed, site and N.
        2. It draws one order of the N places; every row of the batch takes the same.
        3. The first k places of that order stay, in the order of the tokens.

    Args:
        keep: share (float) or count (int) of a picture's tokens.
        seed: of the draw.
        stage: ``"projected"``, ``"decoder"`` or ``"vision"``; ``"auto"`` takes the tokens that the language model
            gets, or a layer of it where `layer` says so, or of a lone tower.
        layer: where in a decoder (start of this layer) or tower (end of it); the middle by default. A draw at a late
            layer is what methods inside the language model have to beat: from some depth on none does.
        scope: what `keep` is meant for in front of or inside a language model: each ``"picture"`` or clip, each
            ``"frame"`` of a clip, each ``"part"`` (crops too), or the ``"sample"``, all pictures of a prompt together.
    """

    paper = "baseline"
    parity = "seeded; no reference"

    budget_parameter = "keep"
    version = 2

    keep: float | int = 0.5
    seed: int = 0
    stage: str = "auto"
    layer: int | None = None
    scope: str = "picture"  # type: ignore[misc]  # what the core reads of every method, here a setting

    def __post_init__(self) -> None:
        check_keep(self.keep, "Random")
        check_range(self.seed, "Random", "seed", kind=int)
        check_choice(self.stage, "Random", "stage", ("auto", "projected", "decoder", "vision"))
        check_layer(self.layer, "Random", "layer")
        check_choice(self.scope, "Random", "scope", BUDGET_SCOPES)
        if self.stage == "projected" and self.layer is not None:
            raise ParameterError(
                f"Random: stage='projected' has no layers, and layer={self.layer} was asked for; stage='decoder' has"
            )

    def sites(self, layout: Layout) -> list[Site]:
        """One site."""
        stage = self.stage
        if stage == "auto":
            inside = "projected" if self.layer is None else "decoder"
            stage = inside if layout.has(inside) else "vision"
        if stage == "projected":
            layout.stage(stage, "Random")
            return [Site("projected")]
        depth = layout.stage(stage, "Random").depth
        layers = layout.layers(stage, depth // 2 if self.layer is None else self.layer, "Random")
        if stage == "vision":
            return [Site(stage, i, "end") for i in layers]
        return [Site(stage, i, "start") for i in layers]

    def reduce(self, view: TokenView) -> Reduction | None:
        """The same draw for every row."""
        batch, n, _ = view.tokens.shape
        k = self.count(view.counts)
        if k == n:
            return None
        subset = random_subset(n, k, self.seed, str(view.site)).to(view.tokens.device)
        return Reduction(subset.expand(batch, k))

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
