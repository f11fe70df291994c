"""VisPruner: important visual tokens by class-token attention, and diverse ones by removal of near duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import ranked
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import SEPARATORS, Counts
from ..core.tower_scores import ScoredByTower, tower_attention
from ..core.view import TokenView

STEP = 8
"""Tokens that leave in one round of the removal."""


def without_duplicates(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Takes tokens with a near duplicate out of a list until k are left (arXiv 2412.01818v2).

    In each round the list is dealt into two halves, A and B, in turn; of A the tokens whose nearest one in B is nearest
    leave, at most 8, and the list is what is left of A, by falling similarity, and B behind it.

    Args:
        x: `[B, N, C]`, features, any floating dtype.
        order: int64 `[B, M]`, the list to begin with.
        k: how many stay.

    Returns:
        int64 `[B, k]`, in the order of the last list. A token that cannot be normalised compares as 0 to all.
    """
    return kernels.drop_duplicates(x, k, order=order, step=STEP)


def important_and_diverse(score: Tensor, x: Tensor, k: int, important: int) -> tuple[Tensor, Tensor]:
    """VisPruner's two choices.

    Args:
        score: `[B, N]`, attention.
        x: `[B, N, C]`, features.
        k: tokens that stay in all, at most N.
        important: of them, those of highest score.

    Returns:
        int64 `[B, important]` by falling score, and `[B, k - important]` in the order of the removal.
    """
    order = ranked(score)
    return order[:, :important], without_duplicates(x, order[:, important:], k - important)


@register_method
@dataclass(eq=False)
class VisPruner(ScoredByTower):
    """Keeps the tokens of each crop that the class token attends to, and of the rest those without near duplicates.

    Both are taken where the projector reads. A tower without a class token gives the attention that a token receives
    from all others instead. Where nothing can leave before the projector, the choice is made at the language model's
    input, one thumbnail, crop or frame at a time, on projected tokens and the attention that follows the host's
    packing.

    Algorithm:
        1. ``s_i = mean_h a_hi`` of class-token attention; the ``floor(k important)`` tokens of highest s stay.
        2. The others form a list L by falling s.
        3. Deal L into A (places 0, 2, ...) and B; ``m_i = max_j cos(x_i, x_j)``, i of A and j of B.
        4. Of A the ``min(8, |L| - rest)`` tokens of highest m leave; L is the rest of A by falling m, then B.
        5. Until ``rest = k - floor(k important)`` are left; all that stay keep the order of the picture.

    Args:
        keep: share (float) or count (int) of a crop's tokens that stay.
        important: share of them that are chosen by attention; 1 is FasterVLM.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"``, so
            that `keep` counts all tokens, as released, or ``"keep"``.
    """

    paper = "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (ICCV 2025)"
    arxiv = "2412.01818"
    code = "https://github.com/Theia-4869/VisPruner"
    parity = "order-exact with the released selection (vispruner_*)"
    deviations = (
        "Computed in fp32 with stable sorts; in the release's half precision one swap of near-equal similarities "
        "changes up to a quarter of the diverse tokens.",
        "Lists of odd length, and fewer than 8 diverse tokens, are possible; the release fails for half of all counts.",
        "A tower without a class token is scored by received attention; the release knows CLIP only.",
        "With several crops a picture, similarities are those of projected tokens; the release takes tower features.",
    )
    caveats = (
        "Counting suffers first: a quarter of scenes-llava's tokens answers print, tables and charts as all do, and 8 "
        "of 25 questions that count to nine (all: 23); a tenth answers none of them (300 questions of scenes-vqa).",
    )
    aliases = (
        Alias("visual_token_num", "keep", "the released code"),
        Alias("important_ratio", "important", "the released code"),
    )
    budget_parameter = "keep"

    keep: float | int = 0.111
    important: float = 0.5
    separators: str = "drop"

    def __post_init__(self) -> None:
        check_keep(self.keep, "VisPruner")
        check_range(self.important, "VisPruner", "important", 0, 1)
        check_choice(self.separators, "VisPruner", "separators", SEPARATORS)

    def reduce(self, view: TokenView) -> Reduction | None:
        """Important and diverse tokens, in the order of the tokens."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        # The release cuts off the product in floating point.
        pair = important_and_diverse(tower_attention(view), view.tokens, k, int(k * self.important))
        return Reduction(torch.cat(pair, 1).sort(dim=1).values)

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
