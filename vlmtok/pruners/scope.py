"""SCOPE: keep visual tokens that are salient and cover the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import SEPARATORS, Counts
from ..core.tower_scores import ScoredByTower
from ..core.view import TokenView


def saliency_coverage(x: Tensor, k: int, saliency: Tensor, alpha: float = 1.0) -> Tensor:
    """Greedy choice of k tokens by what they add to the coverage of all, times their saliency (arXiv 2510.24214).

    A token covers another by their cosine; token j adds ``sum_i max(0, s_ij - cover_i)`` and scores that times
    ``saliency_j ** alpha``. Coverage starts at zero, so negative similarities never count.

    Args:
        x: `[B, N, D]`, visual features, any floating dtype.
        k: how many, at most N.
        saliency: `[B, N]`, not negative; only its ratios matter.
        alpha: its power; 0 leaves coverage alone.

    Returns:
        int64 `[B, k]`, in the order chosen, without repeats. The lowest index wins a tie, NaN tokens come last.
    """
    with kernels.exact(x.device):
        weight = saliency.float() ** alpha
    return kernels.greedy_cover_cosine(x, k, weight=weight)[0]


@register_method
@dataclass(eq=False)
class SCOPE(ScoredByTower):
    """Keeps tokens of each crop by class-token attention times the coverage they add, before the projector.

    Both are taken where the projector reads: features and attention of that tower layer. A tower without a class token
    gives the attention that a token receives from all others instead. Where the projector wants whole crops (AnyRes,
    pooled frames), the choice is made at the language model's input, one thumbnail, crop or frame at a time: coverage
    is that of the projected tokens, and attention follows the host's packing.

    Algorithm:
        1. ``s_ij = cos(x_i, x_j)``; saliency ``a_j = sum_h`` of class-token attention; ``cover_i = 0``.
        2. What j adds: ``g_j = sum_i max(0, s_ij - cover_i)``.
        3. Take ``p = argmax_j g_j a_j^alpha`` of those not yet chosen, then ``cover_i = max(cover_i, s_ip)``.
        4. Until k tokens are chosen; they stay in their order.

    Args:
        keep: share (float) or count (int) of a crop's tokens that stay.
        alpha: power of the attention; 0 leaves coverage alone.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"``, so
            that `keep` counts all tokens, as released, or ``"keep"``.
    """

    paper = "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs (NeurIPS 2025)"
    arxiv = "2510.24214"
    code = "https://github.com/kinredon/SCOPE"
    parity = "order-exact with the released selection (scope_*)"
    deviations = (
        "A token is chosen once, and a zero or NaN token leaves the others alone; the release repeats index 0, or "
        "returns the first tokens.",
        "A tower without a class token is scored by received attention; the release knows CLIP only.",
        "With several crops a picture, similarities are those of projected tokens; the release takes tower features.",
    )
    aliases = (Alias("k", "keep"),)
    budget_parameter = "keep"

    keep: float | int = 0.111
    alpha: float = 1.0
    separators: str = "drop"

    def __post_init__(self) -> None:
        check_keep(self.keep, "SCOPE")
        check_choice(self.separators, "SCOPE", "separators", SEPARATORS)
        check_range(self.alpha, "SCOPE", "alpha", 0)

    def reduce(self, view: TokenView) -> Reduction | None:
        """Greedy choice; slots in the order of the tokens."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        name = "cls_attention@vision:feature"
        if view.has(name):
            saliency = view.signal(name).float().sum(1)
        else:
            saliency = view.signal("received_attention@vision:feature")
        order = saliency_coverage(view.tokens, k, saliency, self.alpha)
        return Reduction(order.sort(dim=1).values)

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
