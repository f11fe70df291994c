"""DivPrune: keep the visual tokens whose closest pair is as far apart as possible."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import check_choice, check_keep, keep_count
from ..core.site import BUDGET_SCOPES, POSITIONS, Counts, Layout, Site
from ..core.view import TokenView


def max_min_subset(x: Tensor, k: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy choice of k tokens with a large smallest distance (arXiv 2503.02175).

    Args:
        x: `[B, N, D]`, visual embeddings, any floating dtype.
        k: how many, at most N.
        valid: bool `[B, N]`, candidates; None means all.

    Returns:
        The chosen tokens ascending, and in the order chosen, int64 `[B, k]` both, without repeats. The first j of the
        order are the choice for j.
    """
    order, _ = kernels.greedy_select(x, k, None, rule="max", valid=valid)
    return order.sort(dim=1).values, order


@register_method
@dataclass(eq=False)
class DivPrune(Method):
    """Keeps a diverse set of each picture's tokens before the language model; it looks at no attention and no text.

    The first token is the most isolated one, each next one has the greatest cosine distance to its nearest chosen
    token.

    Algorithm:
        1. First token: ``argmin_i max_{j != i} cos(x_i, x_j)``, the most isolated one.
        2. Next token: ``argmin_i max_{c in S} cos(x_i, x_c)`` over those not in S: far from every chosen one.
        3. Until k tokens are in S; they stay in their order.

    Args:
        keep: share (float) or count (int) of a picture's tokens that stay; 0.098 is the released setting.
        newlines: row separators of multi-crop pictures are ``"candidates"``, as released, or ``"drop"`` them.
        scope: what `keep` is meant for, and tokens compared in: each ``"picture"`` or clip, each ``"frame"`` of one,
            each ``"part"`` (crops too), or the ``"sample"``, all pictures of a prompt together.
        positions: ``"renumber"`` (as released) or ``"keep"`` the position ids; None is the model's default.
    """

    paper = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (CVPR 2025)"
    arxiv = "2503.02175"
    code = "https://github.com/vbdi/divprune"
    parity = "order-exact with the released selection (divprune_*)"
    deviations = (
        "A token is chosen once; the release repeats indices where tokens are equal, zero, or fewer than asked for.",
        "Each picture has its own share, in batches and prompts of any form; the release takes one picture behind 35 "
        "tokens.",
        "Similarity is computed in fp32 with a running maximum; the release uses the model's dtype.",
        "Shares round half up; the release rounds half to even.",
    )

    aliases = (Alias("ratio", "keep", "the released code"), Alias("subset_ratio", "keep", "the released code"))
    budget_parameter = "keep"

    keep: float | int = 0.098
    newlines: str = "candidates"
    scope: str = "picture"  # type: ignore[misc]  # what the core reads of every method, here a setting
    positions: str | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep, "DivPrune")
        check_choice(self.newlines, "DivPrune", "newlines", ("candidates", "drop"))
        check_choice(self.scope, "DivPrune", "scope", BUDGET_SCOPES)
        check_choice(self.positions, "DivPrune", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input."""
        layout.stage("projected", "DivPrune")
        return [Site("projected", positions=self.positions)]

    def reduce(self, view: TokenView) -> Reduction | None:
        """Farthest-first choice from the most isolated token on."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        valid = view.part >= 0 if self.newlines == "drop" else None
        return Reduction(max_min_subset(view.tokens, k, valid)[0])

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
