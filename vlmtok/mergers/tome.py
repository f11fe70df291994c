"""ToMe: bipartite soft matching of tokens by the similarity of their keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from .. import kernels
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import POOLINGS, check_choice, check_flag, check_layers, check_range
from ..core.site import Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError


def bipartite(metric: Tensor, r: int, num_prefix: int = 0) -> Reduction | None:
    """Merges the r most similar pairs between the even and the odd places of a row (ToMe, section 3).

    Args:
        metric: `[B, N, D]`, what is compared; protected tokens are not among them.
        r: pairs to merge, at most N // 2.
        num_prefix: protected tokens in front of the row; they count for which places are even.

    Returns:
        Slots in the released order: the even places that stay (ascending behind a prefix, by falling similarity
        without one), then the odd places. None where nothing merges.
    """
    n = metric.shape[1]
    r = min(r, n // 2)
    if r <= 0:
        return None
    return Reduction(*kernels.bipartite_match(metric, r, num_prefix))


def inflected_schedule(r: int | list[int] | tuple[int, float], depth: int) -> list[int]:
    """Tokens to merge in each layer.

    Args:
        r: a number for every layer, a list (short ones go on with 0), or (r, inflection): a line with mean r that
            falls for an inflection of -1, is flat for 0 and rises for 1.
        depth: number of layers.

    Returns:
        `depth` numbers.
    """
    if isinstance(r, int):
        return [r] * depth
    if isinstance(r, list):
        return (r + [0] * depth)[:depth]
    mean, inflection = r
    low = int(mean * (1.0 - inflection))
    step = 0.0 if depth < 2 else (2 * mean - 2 * low) / (depth - 1)
    return [int(low + step * i) for i in range(depth)]


@register_method
@dataclass(eq=False)
class ToMe(Method):
    """Merges r tokens in every layer of a vision tower, between attention and MLP, by the mean of the heads' keys.

    Algorithm:
        1. Keys k of the block, mean over heads; places of the row, protected ones counted, alternate: A even, B odd.
        2. ``s_a = max_b cos(k_a, k_b)`` for every a in A.
        3. The r tokens of A with the highest s_a join that b; r is at most half of the tokens.
        4. A slot is the size-weighted mean ``sum m_i x_i / sum m_i``, its size ``sum m_i``.
        5. With `prop_attn` later blocks compute ``softmax(q k^T / sqrt(d) + log m)``.

    Args:
        r: tokens merged in a layer: an int for every layer, a list with one int a layer, or (r, inflection) for a
            falling (-1) or rising (1) schedule with the same mean. Capped at half of the tokens.
        prop_attn: add log(size) to the attention logits, so that a token counts as often as it stands for patches.
        pooling: what a merged token counts in a head that pools tokens: ``"size"`` weights means by size, as the
            released MAE patch does; ``"plain"`` counts it once; ``"attention"`` also adds log(size) to an attention
            pool's logits.
    """

    paper = "Token Merging: Your ViT But Faster (ICLR 2023)"
    arxiv = "2210.09461"
    code = "https://github.com/facebookresearch/ToMe"
    parity = "index-exact with the released bipartite matching; end to end 1e-4 on a timm ViT (tome_*, e2e_micro_vit*)"
    deviations = (
        "A zero key has similarity 0 to everything; the release divides by zero and merges every token into one.",
        "Equal similarities go to the lowest index; the release sorts unstably.",
        "All protected tokens of the model stay in front (registers too); the release knows CLS and distillation.",
        "Keys are read after a key norm, where a model has one.",
        "Every head that pools by average weights tokens by size; the release does so for MAE alone, and its patch for "
        "other models is pooling='plain'.",
    )

    budget_parameter = "r"

    r: int | list[int] | tuple[int, float] = 8
    prop_attn: bool = True
    pooling: str = "size"

    def __post_init__(self) -> None:
        if isinstance(self.r, tuple):
            if len(self.r) != 2:
                raise ParameterError(f"ToMe: r={self.r!r} must be an int, a list of ints, or (r, inflection)")
            check_range(self.r[0], "ToMe", "r[0]", 0, kind=int)
            check_range(self.r[1], "ToMe", "inflection", -1, 1)
        else:
            for value in self.r if isinstance(self.r, list) else [self.r]:
                check_range(value, "ToMe", "r", 0, kind=int)
            if self.r == []:
                raise ParameterError("ToMe: r=[] names no layer; give one int a layer")
        check_flag(self.prop_attn, "ToMe", "prop_attn")
        check_choice(self.pooling, "ToMe", "pooling", POOLINGS)

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        """As `prop_attn`."""
        return self.prop_attn

    def sites(self, layout: Layout) -> list[Site]:
        """Every layer of the tower in which something merges."""
        depth = layout.stage("vision", "ToMe").depth
        if isinstance(self.r, list):
            check_layers(self.r, depth, "ToMe", "r")
        plan = inflected_schedule(self.r, depth)
        return [Site("vision", i, "mid", ("keys",)) for i in layout.layers("vision") if plan[i] > 0]

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """Moves `r`; a number becomes a list where layers have to differ by one."""
        depth = layout.stage("vision", "ToMe").depth
        total = round((1.0 - level) * depth * (tokens // 2))
        if isinstance(self.r, tuple):
            return replace(self, r=(round(total / depth), self.r[1]))
        if isinstance(self.r, list):
            so_far = [round(total * sum(self.r[:i]) / max(sum(self.r), 1)) for i in range(len(self.r) + 1)]
            return replace(self, r=[later - before for before, later in pairwise(so_far)])
        each, rest = divmod(total, depth)
        return replace(self, r=[each + (i < rest) for i in range(depth)] if rest else each)

    def reduce(self, view: TokenView) -> Reduction | None:
        """Bipartite matching of the view's keys."""
        return bipartite(view.signal("keys"), self._r(view.counts), view.num_prefix)

    def count(self, counts: Counts) -> int:
        """Tokens that arrive, less the merged ones."""
        return counts.n - min(self._r(counts), counts.n // 2)

    def _r(self, counts: Counts) -> int:
        return inflected_schedule(self.r, counts.depth)[counts.layer]
