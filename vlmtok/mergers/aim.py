"""AIM: merge similar visual tokens before the language model, then let its layers use fewer and fewer of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.aliases import Alias
from ..core.between_layers import DropsBetweenLayers
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_flag, check_range
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError, SiteError
from ..kernels.exact import exact
from .tome import bipartite


def iterative_merge(x: Tensor, passes: int = 2) -> Reduction | None:
    """Halves the tokens several times by bipartite matching (arXiv 2412.03248).

    A pass joins tokens at even places to their most similar token at an odd place and takes plain means of what the
    pass before left, so that after several passes a slot is not the mean of its patches.

    Args:
        x: `[B, N, D]`, visual embeddings.
        passes: how often; pass i merges N // 2^i pairs, as long as there are any.

    Returns:
        One reduction for all passes, its slots in the order of the release (unmerged even places by falling
        similarity, then odd places); None where nothing merges.
    """
    n = x.shape[1]
    tokens, plan = x.float(), None
    for i in range(1, passes + 1):
        found = bipartite(tokens, n >> i)
        if found is None or found.src is None or found.dst is None:
            break
        step = Reduction.mean(found.keep, found.src, found.dst)
        tokens = step.apply(tokens)[0]
        plan = step if plan is None else plan.then(step)
    return plan


def merged_count(n: int, passes: int = 2) -> int:
    """Tokens that `iterative_merge` leaves of n."""
    left = n
    for i in range(1, passes + 1):
        left -= min(n >> i, left // 2)
    return left


def pagerank_importance(logits: Tensor, tau: float = 0.1, iterations: int = 5, damping: float = 0.0) -> Tensor:
    """How much attention flows to each token over several hops (arXiv 2412.03248).

    Args:
        logits: `[B, H, L, L]`, scaled and causally masked attention logits; rows are queries.
        tau: temperature of the softmax over them.
        iterations: hops.
        damping: share of the mass that jumps to a token at random in every hop. At 0, as released, a causal row
            drains most of its mass to its first tokens.

    Returns:
        fp32 `[B, L]`, the root mean square over heads.
    """
    with exact(logits.device):
        hop = (logits.float() / tau).softmax(-1)
        length = logits.shape[-1]
        mass = torch.full_like(hop[:, :, :1], 1.0 / length)
        for _ in range(iterations):
            mass = (1.0 - damping) * (mass @ hop) + damping / length
        return mass.squeeze(2).square().mean(1).sqrt()


def retention(depth: int, first: int, last: int) -> list[float]:
    """Share of the visual tokens with which each decoder layer runs.

    Args:
        depth: layers.
        first: first layer with fewer tokens.
        last: first layer without visual tokens; the share falls by equal steps between the two.

    Returns:
        `depth` shares, 1 before `first` and 0 from `last` on.
    """
    steps = last - first + 1
    return [min(1.0, max(0, last - layer) / steps) for layer in range(depth)]


_PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "vicuna": {"first": 13, "last": 20}}


@register_method
@dataclass(eq=False)
class AIM(DropsBetweenLayers):
    """Merges similar tokens of each picture or frame before the decoder, then prunes them step by step inside it.

    Inside, a token's importance is a PageRank on the layer's own attention. It needs all attention logits of the
    layers that cut: memory and time of heads x L x L each. With a causal mask and `damping` 0 the importance favours
    early tokens strongly.

    Algorithm:
        1. Pass i of `passes` before the decoder: even places A, odd places B, ``s_a = max_b cos(x_a, x_b)``.
        2. The ``N // 2^i`` tokens of A with the highest s_a join that b; a slot is the plain mean of what joins.
        3. From `first` on decoder layer l runs with ``V (last - l) // (last - first + 1)`` of the V that entered.
        4. Importance from the attention logits Z of the layer before: ``P = softmax(Z / tau)``, ``v_0 = 1 / L``.
        5. ``v = (1 - damping) v P + damping / L``, `iterations` times; ``s_n = sqrt(mean_h v_n^2)``.
        6. The tokens of highest s_n stay, in their order; from `last` on none.

    Args:
        passes: merging passes before the decoder (each about halves the tokens); 0 leaves merging out.
        prune: prune inside the decoder.
        first: 0-based decoder layer that is the first with fewer visual tokens; half the depth by default (14 of 28).
        last: 0-based decoder layer that is the first without visual tokens; 3/4 of the depth by default (21 of 28).
            Layer l between them runs with (last - l) / (last - first + 1) of the tokens that entered, rounded down.
        tau: temperature of the attention in the PageRank.
        iterations: its hops.
        damping: share of its mass that jumps at random; more weakens the preference for early tokens.
        positions: ``"keep"`` the position ids of what stays inside the decoder, which equals the released masking, or
            ``"renumber"`` them. Merged tokens are always renumbered.
    """

    paper = "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning (ICCV 2025)"
    arxiv = "2412.03248"
    code = "https://github.com/LaVi-Lab/AIM"
    parity = "merge, importance and schedule equal the released functions (1e-5) (aim.json)"
    caveats = (
        "It loses to Random on tiny-llava at 36 tokens (71.3 % against 75.9 %) and wins at 16 (68.1 % against "
        "49.2 %). The likely cause, not examined: before the language model it takes means of unlike tokens, "
        "which that model was never shown.",
    )
    deviations = (
        "Dropped tokens leave the sequence; the release masks them, which saves nothing, and counts them as places "
        "where the PageRank starts.",
        "At least one visual token stays until the schedule says none.",
        "A pass with nothing to merge ends the merging; the release returns nothing and fails later.",
        "Equal similarities and importances go to the lowest index.",
    )
    scope = "sample"
    joins_cuts = True
    aliases = (Alias("l1", "first"), Alias("l2", "last"))
    budget_parameter = "first"
    counted = "prune=false"

    passes: int = 2
    prune: bool = True
    first: int | None = None
    last: int | None = None
    tau: float = 0.1
    iterations: int = 5
    damping: float = 0.0
    positions: str = "keep"

    def __post_init__(self) -> None:
        check_range(self.passes, "AIM", "passes", 0, kind=int)
        check_flag(self.prune, "AIM", "prune")
        if not self.passes and not self.prune:
            raise ParameterError("AIM: passes=0 and prune=False leave nothing to do")
        for name in ("first", "last"):
            if getattr(self, name) is not None:
                check_range(getattr(self, name), "AIM", name, 1, kind=int)
        if self.first is not None and self.last is not None and self.last < self.first:
            raise ParameterError(f"AIM: last={self.last} lies before first={self.first}")
        check_range(self.tau, "AIM", "tau", 0)
        if self.tau == 0:
            raise ParameterError("AIM: tau=0 is not possible; logits are divided by it")
        check_range(self.iterations, "AIM", "iterations", 1, kind=int)
        check_range(self.damping, "AIM", "damping", 0, 1)
        check_choice(self.positions, "AIM", "positions", POSITIONS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> AIM:
        """The settings of one released model.

        Args:
            name: ``"paper"`` (LLaVA-OneVision-7B: layers 14 to 21 of 28), ``"vicuna"`` (layers 13 to 20 of 32).
            overrides: parameters that differ.

        Returns:
            The method.

        Raises:
            ParameterError: no such preset.
        """
        check_choice(name, "AIM", "preset", tuple(_PRESETS))
        return cls(**{**_PRESETS[name], **overrides})

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input, and the ends of the layers after which fewer tokens go on."""
        sites = []
        if self.passes:
            layout.stage("projected", "AIM")
            sites.append(Site("projected", scope="part"))
        if self.prune:
            first, last = self._span(layout.stage("decoder", "AIM").depth)
            # Dropping everything needs no score.
            sites += [
                Site("decoder", i - 1, "end", ("attention_logits",) if i < last else (), positions=self.positions)
                for i in layout.layers("decoder", range(first, last + 1), "AIM")
            ]
        return sites

    def fitted(self, layout: Layout) -> Method | None:
        """Its pruning over the layers where tokens may leave."""
        if self.first is not None or self.last is not None:
            return None
        first, last = self._span(layout.stages["decoder"].room())
        return replace(self, first=first, last=last)

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """Moves `first` and `last` together through the decoder."""
        if not self.prune:
            raise ParameterError("AIM: a budget moves where it prunes, and prune=False leaves that out")
        depth = layout.stage("decoder", "AIM").depth
        first, last = self._span(depth)
        begin = 1 + round(level * (depth - 2))
        return replace(self, first=begin, last=min(begin + last - first, depth - 1))

    def reduce(self, view: TokenView) -> Reduction | None:
        """Merges at ``projected``, prunes in the decoder."""
        if view.site.stage != "decoder":
            return iterative_merge(view.tokens, self.passes)
        batch, n, _ = view.tokens.shape
        k = self.count(view.counts)
        if k == n:
            return None
        if k == 0:
            return Reduction(torch.zeros(batch, 0, dtype=torch.int64, device=view.tokens.device))
        score = pagerank_importance(view.signal("attention_logits"), self.tau, self.iterations, self.damping)
        return Reduction(keep_top(score.gather(1, view.columns), k))

    def count(self, counts: Counts) -> int:
        """What merging leaves, or the share of the layer that comes next."""
        if counts.site.stage != "decoder":
            return merged_count(counts.n, self.passes)
        first, last = self._span(counts.depth)
        layer = counts.layer + 1
        if not self.prune or layer < first:
            return counts.n
        if layer >= last:
            return 0
        # Whole numbers: the share times the count can fall just short of one in floating point.
        return min(counts.n, max(1, counts.entered * (last - layer) // (last - first + 1)))

    def _span(self, depth: int) -> tuple[int, int]:
        """First layer with fewer visual tokens, first layer with none."""
        first = max(1, depth // 2) if self.first is None else self.first
        last = max(first, 3 * depth // 4) if self.last is None else self.last
        if last < first:
            raise SiteError(f"AIM: last={last} lies before first={first}, half of the {depth} layers")
        return first, last
