"""FastV: after layer K keep the visual tokens that the prompt's last token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.aliases import Alias, share_that_goes
from ..core.between_layers import DropsBetweenLayers
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView


def last_row_score(last_attention: Tensor) -> Tensor:
    """Attention of the prompt's last token, mean over heads (arXiv 2403.06764).

    Args:
        last_attention: `[B, H, N]`, softmax over the whole row, cut to the visual tokens.

    Returns:
        fp32 `[B, N]`.
    """
    return last_attention.float().mean(1)


@register_method
@dataclass(eq=False)
class FastV(DropsBetweenLayers):
    """Drops visual tokens once, after the first K decoder layers, by the attention of the prompt's last token.

    The score is the softmax attention of layer K - 1 (0-based) as that layer computed it; layer K is the first that
    runs without the dropped tokens. All pictures of a prompt share one budget.

    Algorithm:
        1. Layers 0 to K - 1 run on all tokens.
        2. ``s_n = mean_h a_h[last, n]``, a the softmax attention of layer K - 1, of the prompt's last token.
        3. The k visual tokens of highest s_n stay, in their order; layers K and later run without the others.

    Args:
        K: decoder layers that see every token, as in the paper (0-based: the cut is at the end of layer K - 1).
        keep: share (float) or count (int) of the visual tokens that stay. The paper's R is the share that goes:
            keep = 1 - R.
        positions: ``"keep"`` the position ids of what stays, as released, or ``"renumber"`` them.
    """

    paper = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
        "Models (ECCV 2024)"
    )
    arxiv = "2403.06764"
    code = "https://github.com/pkunlp-icler/FastV"
    parity = "index-exact with the released selection; hidden states of kept rows equal the released forward (fastv_*)"
    deviations = (
        "Tokens leave once, in prefill, with the cache on; the release hides them behind a mask (accuracy runs) or "
        "scores again at every generated token without a cache (latency runs).",
        "The visual tokens are those of the prompt, of any number of pictures; the release hard-codes one span.",
        "K = 0, a random choice in the release, is the method Random.",
        "Equal scores go to the lowest index.",
    )
    aliases = (
        share_that_goes("R", "keep", "FastV"),
        share_that_goes("fastv_r", "keep", "FastV", "the released code"),
        Alias("fastv_k", "K", "the released code"),
        Alias("agg_layer", "K", "the released code"),
        Alias("attention_rank", "keep", "the released code"),
        Alias("ratio", instead="R is the share that goes, keep the share that stays; name one of them"),
    )
    budget_parameter = "keep"
    scope = "sample"

    K: int = 2
    keep: float | int = 0.5
    positions: str = "keep"

    def __post_init__(self) -> None:
        check_range(self.K, "FastV", "K", 1, kind=int)
        check_keep(self.keep, "FastV")
        check_choice(self.positions, "FastV", "positions", POSITIONS)

    def sites(self, layout: Layout) -> list[Site]:
        """The end of layer K - 1; layer K must exist."""
        return [
            Site("decoder", layer - 1, "end", ("last_attention",), positions=self.positions)
            for layer in layout.layers("decoder", self.K, "FastV")
        ]

    def reduce(self, view: TokenView) -> Reduction | None:
        """The best tokens by the last row's attention."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        return Reduction(keep_top(last_row_score(view.signal("last_attention")), k))

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
