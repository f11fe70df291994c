"""FasterVLM: keep the visual tokens that the tower's class token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.aliases import Alias
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_keep, keep_count
from ..core.site import SEPARATORS, Counts
from ..core.tower_scores import ScoredByTower, tower_attention
from ..core.view import TokenView


@register_method
@dataclass(eq=False)
class FasterVLM(ScoredByTower):
    """Keeps the tokens of each crop that the tower's class token attends to most, before the projector.

    It is VisPruner without the diverse half. A tower without a class token gives the attention that a token receives
    from all others instead; where nothing can leave before the projector, the choice is made behind it, crop by crop.

    Algorithm:
        1. ``s_i = mean_h a_hi`` of class-token attention in the layer whose output the projector reads.
        2. The k tokens of highest s stay.
        3. They keep the order of the picture.

    Args:
        keep: share (float) or count (int) of a crop's tokens that stay.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"``, so
            that `keep` counts all tokens, as released, or ``"keep"``.
    """

    paper = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning (2024)"
    arxiv = "2412.01818v1"
    code = "https://github.com/Theia-4869/FasterVLM"
    parity = "index-exact with the released selection (vispruner_fastervlm_*)"
    deviations = (
        "Scores are compared in fp32; equal ones go to the lowest index.",
        "A tower without a class token is scored by received attention; the release knows CLIP only.",
    )
    caveats = (
        "Attention crowds: with a quarter of scenes-llava's tokens 75 % of 300 questions are right, 91 % where half of "
        "them are chosen for being different (`vispruner`).",
    )
    aliases = (Alias("visual_token_num", "keep", "the released code"),)
    budget_parameter = "keep"

    keep: float | int = 0.25
    separators: str = "drop"

    def __post_init__(self) -> None:
        check_keep(self.keep, "FasterVLM")
        check_choice(self.separators, "FasterVLM", "separators", SEPARATORS)

    def reduce(self, view: TokenView) -> Reduction | None:
        """The tokens of highest attention."""
        k = self.count(view.counts)
        return None if k == view.counts.n else Reduction(keep_top(tower_attention(view), k))

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
