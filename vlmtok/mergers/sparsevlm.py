"""SparseVLM: prune by the attention of the text tokens that matter to the picture, and recycle some of what goes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.between_layers import DropsBetweenLayers
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import check_choice, check_keep, check_schedule_layers, keep_count, scaled
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import MissingSignal, ParameterError
from ..kernels.exact import exact

_PATCHES = 576  # visual tokens for which the release states its budgets
_BUDGETS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
_LAYERS, _DEPTH = (2, 6, 15), 32


def rater_weights(visual: Tensor, text: Tensor) -> Tensor:
    """How much the picture cares for each text token (arXiv 2410.04417).

    Args:
        visual: `[B, N, D]`, visual embeddings at the language model's input.
        text: `[B, T, D]`, embeddings of the text behind them; T at least 1.

    Returns:
        fp32 `[B, T]`: the mean over visual tokens of the softmax over text of their inner products; sums to 1.
    """
    return kernels.received_attention(visual.unsqueeze(1), text.unsqueeze(1), scale=1.0)


def choose_raters(weights: Tensor) -> Tensor:
    """The text tokens that rate the visual ones: those above the mean.

    Args:
        weights: `[B, T]`.

    Returns:
        bool `[B, T]`; all tokens where none is above the mean (a text of one token, say).
    """
    above = weights > weights.mean(-1, keepdim=True)
    return above | ~above.any(-1, keepdim=True)


def rated_relevance(text_attention: Tensor, raters: Tensor) -> Tensor:
    """Attention of the raters on each visual token.

    Args:
        text_attention: `[B, H, T, N]`, softmax over the whole row, cut to the visual tokens.
        raters: bool `[B, T]`, at least one in each row.

    Returns:
        fp32 `[B, N]`, the mean over heads and raters.
    """
    rows = torch.where(raters.unsqueeze(-1), text_attention.float().mean(1), 0.0)
    return rows.sum(1) / raters.sum(1, keepdim=True)


def recycled_counts(dropped: int) -> tuple[int, int]:
    """How many dropped tokens come back, and as how many clusters.

    Args:
        dropped: tokens that a cut leaves out.

    Returns:
        Recycled tokens, int(0.3 dropped) + 1, and their clusters, int(recycled / 10) + 1; both 0 for nothing dropped.
    """
    if dropped <= 0:
        return 0, 0
    recycled = int(0.3 * dropped) + 1
    return recycled, recycled // 10 + 1


def density_clusters(x: Tensor, clusters: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Density-peak clustering with k nearest neighbours (arXiv 2410.04417, token recycling).

    A centre has a high density (its `clusters` nearest tokens, itself included, are near) and stands far from any
    token of higher density. Distances are Euclidean over the square root of D.

    Args:
        x: `[B, M, D]`, the tokens; NaN and infinity count as 0.
        clusters: how many, at most M.
        noise: `[B, M]`, added to the densities. The release adds uniform noise up to 1e-6 to break ties; without it
            the lower index counts as denser.

    Returns:
        The centres by falling score, int64 `[B, clusters]`, and the cluster of each token, int64 `[B, M]` (a centre is
        in its own; else the nearest centre's, the first of equally near ones).
    """
    batch, m, width = x.shape
    with exact(x.device):
        points = x.float().nan_to_num(0.0, 0.0, 0.0)
        points = points - points.mean(1, keepdim=True)  # nearer to 0, less is lost in the difference of squares
        gram = points @ points.transpose(1, 2)
        square = gram.diagonal(dim1=1, dim2=2)
        far = square.unsqueeze(2) + square.unsqueeze(1) - (gram + gram.transpose(1, 2))
        place = torch.arange(m, device=x.device)
        far = (far / width).clamp(min=0.0).masked_fill(place[:, None] == place, 0.0)
        distance = far.sqrt()
        density = torch.exp(-far.topk(clusters, dim=-1, largest=False).values.mean(-1))
        if noise is not None:
            density = density + noise
        mine, other = density.unsqueeze(2), density.unsqueeze(1)
        denser = (other > mine) | ((other == mine) & (place < place[:, None]))
        apart = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(-1)
        centres = (density * apart).argsort(dim=1, descending=True, stable=True)[:, :clusters]
        to_centre = distance.gather(2, centres.unsqueeze(1).expand(batch, m, clusters))
        cluster = to_centre.argmin(-1)
        own = torch.arange(clusters, device=x.device).expand(batch, clusters)
        return centres, cluster.scatter(1, centres, own)


def prune_and_recycle(x: Tensor, relevance: Tensor, k: int, noise: Tensor | None = None) -> Reduction:
    """Keeps the k most relevant tokens, and clusters of the best of the others behind them.

    Args:
        x: `[B, N, D]`, hidden states; what is clustered.
        relevance: `[B, N]`, higher is better.
        k: tokens kept as they are, from 1 to N - 1.
        noise: `[B, M]` for `density_clusters`, M the recycled tokens by falling relevance.

    Returns:
        Slots: the kept tokens in their order, then the clusters (plain means of their members, named by their
        centres).
    """
    recycled, clusters = recycled_counts(x.shape[1] - k)
    relevance = torch.where(relevance.isnan(), float("-inf"), relevance.float())
    order = relevance.argsort(dim=1, descending=True, stable=True)
    # Clustered by falling relevance, so that of two tokens of equal density the more relevant one is the centre.
    pool = order[:, k : k + recycled]
    centres, cluster = density_clusters(x.gather(1, pool.unsqueeze(-1).expand(-1, -1, x.shape[-1])), clusters, noise)
    is_centre = torch.zeros_like(pool).scatter(1, centres, 1)
    others = is_centre.argsort(dim=1, stable=True)[:, : recycled - clusters]
    keep = torch.cat([order[:, :k].sort(dim=1).values, pool.gather(1, centres)], 1)
    return Reduction.mean(keep, pool.gather(1, others), cluster.gather(1, others) + k)


@register_method
@dataclass(eq=False)
class SparseVLM(DropsBetweenLayers):
    """Prunes visual tokens at three decoder layers by the attention of chosen text tokens, and recycles some.

    The raters are chosen once, from the embeddings at the language model's input: text tokens that the picture cares
    for more than for the average one. A cut keeps the tokens that they attend to; of the others the best 30 percent
    come back as a few cluster means behind the kept ones, and count as visual tokens at the next cut. A prompt that
    ends with the picture has no rater: there its last row rates. This is the first released version.

    Algorithm:
        1. Before the decoder ``w_t = mean_n softmax_t(x_n . e_t)``; text tokens with ``w_t > mean w`` are the raters.
        2. At a cut ``s_n = mean over heads and raters of attention[t, n]``; the k tokens of highest s_n stay.
        3. Of d others the best ``m = int(0.3 d) + 1`` come back as ``c = m // 10 + 1`` clusters.
        4. With ``D_ij = |x_i - x_j| / sqrt(width)`` a token's density is ``rho_i = exp(-mean of the c smallest
           D_ij^2)`` and ``delta_i = min D_ij`` over denser j (the greatest D where there is none).
        5. The c tokens of highest ``rho_i delta_i`` are centres, the others join the nearest; a slot is the plain mean.

    Args:
        tokens: the released table for 192, 128, 96 or 64 tokens (a mean over layers), stated for 576 visual tokens and
            scaled by how many entered the decoder.
        budgets: kept at each cut besides the recycled ones, in place of the table: counts (int) or shares of the
            tokens that entered (float).
        layers: 0-based layers at whose end it cuts; None means 2, 6, 15 of 32 layers and the same fractions of other
            depths. In a decoder too short for that, cuts that fall on one layer are one, with the last one's budget.
        positions: ``"renumber"`` the position ids of what stays, as released, or ``"keep"`` them (a cluster takes
            that of its centre). None renumbers where the model can, and keeps them where they are places in a picture
            (M-RoPE).
    """

    paper = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (ICML 2025)"
    arxiv = "2410.04417"
    code = "https://github.com/Gumpest/SparseVLMs"
    parity = "raters, relevance and kept tokens equal the first release; clusters 1e-4 (sparsevlm_*)"
    caveats = (
        "It loses to Random on tiny-llava (36.8 % against 75.9 % at 36 tokens a layer): its layers, scaled to a "
        "depth of 16, cut from layer 1 on, where that model does not look at the picture yet (no attention of the"
        " last row falls on it before layer 2). With layers=(2, 3, 7) it answers 70.9 %, more than Random from "
        "the same layer (51.5 %); at 72 tokens it still loses.",
    )
    deviations = (
        "No noise on the cluster densities: of two tokens of equal density the more relevant one counts as denser.",
        "With two clusters mutual nearest neighbours always tie, so that the release's clusters depend on its noise "
        "there; `prune_and_recycle` takes that noise as an argument.",
        "Budgets are the released table; the paper's rank-based adaptive ratio is not in the released code.",
        "Where no text token is above the mean, all of them rate; the release gets NaN.",
        "Budgets scale with the visual tokens that entered; the release assumes 576 of one picture, at batch 1.",
        "At least one token stays.",
    )
    scope = "sample"
    joins_cuts = True
    aliases = (Alias("retained_tokens", "tokens", "the released code"),)
    budget_parameter = "budgets"

    tokens: int = 192
    budgets: tuple[int | float, ...] | None = None
    layers: tuple[int, ...] | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        check_choice(self.tokens, "SparseVLM", "tokens", tuple(_BUDGETS))
        if self.budgets is not None:
            if not isinstance(self.budgets, (tuple, list)) or not self.budgets:
                raise ParameterError(f"SparseVLM: budgets={self.budgets!r} must be a tuple with one for each cut")
            for budget in self.budgets:
                check_keep(budget, "SparseVLM", "budgets")
        cuts = len(_LAYERS) if self.budgets is None else len(self.budgets)
        if self.layers is not None:
            check_schedule_layers(self.layers, "SparseVLM", cuts=cuts, low=0)
        elif cuts != len(_LAYERS):
            raise ParameterError(
                f"SparseVLM: budgets={self.budgets!r} needs layers, one for each; the default layers are {len(_LAYERS)}"
            )
        check_choice(self.positions, "SparseVLM", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input, where it only looks, and the ends of its layers."""
        layout.stage("projected", "SparseVLM")
        plan = self._plan(layout.stage("decoder", "SparseVLM").depth)
        return [Site("projected", needs=("text",))] + [
            Site(
                "decoder",
                layer,
                "end",
                ("text_attention", "last_attention"),
                positions=layout.positions("decoder", self.positions),
            )
            for layer in layout.layers("decoder", list(plan), "SparseVLM")
        ]

    def fitted(self, layout: Layout) -> Method | None:
        """Its cuts over the layers where tokens may leave."""
        if self.layers is not None:
            return None
        plan = self._plan(layout.stages["decoder"].room())
        if len(plan) < len(_LAYERS):
            return replace(self, layers=tuple(plan), budgets=tuple(plan.values()))
        return replace(self, layers=tuple(plan))

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """Moves `budgets`, from those of the table where none are given."""
        given = self.budgets or tuple(budget / _PATCHES for budget in _BUDGETS[self.tokens])
        return replace(self, budgets=scaled(given, level, tokens))

    def reduce(self, view: TokenView) -> Reduction | None:
        """Chooses raters at ``projected``, prunes and recycles in the decoder."""
        if view.site.stage == "projected":
            text = view.maybe("text")
            if text is not None and text.shape[1]:
                view.row["raters"] = choose_raters(rater_weights(view.tokens, text))
            return None
        k = self._kept(view.counts)
        if k == view.counts.n:
            return None
        return prune_and_recycle(view.tokens, self._relevance(view), k)

    def count(self, counts: Counts) -> int:
        """The layer's budget and the clusters; all where it only looks."""
        k = self._kept(counts)
        return k + recycled_counts(counts.n - k)[1]

    def _relevance(self, view: TokenView) -> Tensor:
        text = view.maybe("text_attention")
        if text is None or text.shape[2] == 0:
            return view.signal("last_attention").float().mean(1)
        if "raters" not in view.row:
            raise MissingSignal(f"SparseVLM chose no raters before {view.site}; it needs its site at 'projected'")
        return rated_relevance(text, view.row["raters"])

    def _kept(self, counts: Counts) -> int:
        """Tokens kept as they are, without the recycled ones."""
        budget = self._plan(counts.depth).get(counts.layer)
        if budget is None or counts.site.stage == "projected":
            return counts.n
        return min(keep_count(budget, counts.entered), max(1, counts.n - 1), counts.n)

    def _plan(self, depth: int) -> dict[int, int | float]:
        """Layer to budget."""
        budgets: tuple[int | float, ...] = tuple(b / _PATCHES for b in _BUDGETS[self.tokens])
        if self.budgets is not None:
            budgets = self.budgets
        layers = self.layers or tuple(layer * depth // _DEPTH for layer in _LAYERS)
        return dict(zip(layers, budgets))
