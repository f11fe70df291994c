"""ToDRE: keep a diverse set of visual tokens, then drop them all where the language model no longer looks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.between_layers import DropsBetweenLayers
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import random_order
from ..core.settings import check_choice, check_keep, check_layer, check_range, keep_count
from ..core.site import BUDGET_SCOPES, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError

PIVOTS = ("cls", "center", "farthest", "random")


def _late(depth: int) -> int:
    """The layer of a decoder of so many at whose end stage 2 looks."""
    return max(0, math.floor(7 * depth / 8) - 1)


def diverse_subset(
    x: Tensor, k: int, pivot: Tensor, *, rule: str = "sum", valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy choice of k mutually dissimilar tokens (arXiv 2505.18757v2, algorithm 1).

    Args:
        x: `[B, N, D]`, visual embeddings at the language model's input.
        k: how many, at most N.
        pivot: int64 `[B]`, the first one.
        rule: ``"sum"`` minimises the summed similarity to the chosen ones (second version of the paper), ``"max"``
            the greatest one (k-center, first version).
        valid: bool `[B, N]`, candidates; None means all.

    Returns:
        The chosen tokens ascending, and in the order chosen, int64 `[B, k]` both. The first j of the order are the
        choice for j, whatever k.
    """
    order, _ = kernels.greedy_select(x, k, pivot, rule=rule, valid=valid)
    return order.sort(dim=1).values, order


def relevance(text_attention: Tensor, attention_to_text: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention mass between text and pictures (arXiv 2505.18757v2, eq. 8).

    Args:
        text_attention: `[B, H, T, N]`, attention of text rows on the visual tokens.
        attention_to_text: `[B, N]`, mass of each visual row on text.

    Returns:
        Text to vision and vision to text, fp32 `[B]` each.
    """
    return text_attention.float().sum(-1).mean((1, 2)), attention_to_text.float().mean(1)


def _check_pivot(how: str | int, n: int) -> None:
    """Checks that a pivot named by its index exists among n tokens.

    Raises:
        ParameterError: it does not.
    """
    if isinstance(how, int) and how >= n:
        raise ParameterError(f"ToDRE: pivot={how} does not exist among {n} tokens")


def pivot_of(x: Tensor, how: str | int, valid: Tensor, attention: Tensor | None = None, seed: int = 0) -> Tensor:
    """The first token of the greedy choice.

    Args:
        x: `[B, N, D]`.
        how: ``"cls"`` highest CLS attention, ``"center"`` nearest to the mean, ``"farthest"`` from it, ``"random"``
            (the first of one random order that may be it), or an index, whatever `valid` says of it.
        valid: bool `[B, N]`, tokens that may be it.
        attention: `[B, H, N]`, CLS attention, for ``"cls"``.
        seed: for ``"random"``.

    Returns:
        int64 `[B]`; the lowest index wins a tie. A token with NaN or infinity is never chosen while another that may
        be it is left: the first of those stands in for one that was named by its index.

    Raises:
        ParameterError: there is no token of that index, or the attention is on another number of tokens.
    """
    batch, n, _ = x.shape
    _check_pivot(how, n)
    finite = torch.linalg.vector_norm(x.float(), dim=-1).isfinite()
    if isinstance(how, int):
        score = torch.zeros(batch, n, dtype=torch.float32, device=x.device)
        score[:, how] = 1.0
        valid = valid | (score > 0)
    elif how == "random":
        score = -random_order(n, seed, "todre").argsort().to(x.device).float().expand(batch, n)
    elif how == "cls" and attention is not None:
        if attention.shape[2] != n:
            raise ParameterError(f"ToDRE: the CLS attention is on {attention.shape[2]} tokens, there are {n}")
        score = attention.float().mean(1)
    else:
        with kernels.exact(x.device):
            mean = torch.where(finite.unsqueeze(-1), x.float(), 0.0).sum(1, keepdim=True)
            score = (kernels.unit_rows(x) @ kernels.unit_rows(mean).transpose(1, 2)).squeeze(-1)
            if how == "farthest":
                score = -score
    return torch.where(finite & valid & ~score.isnan(), score, float("-inf")).argmax(1)


@register_method
@dataclass(eq=False)
class ToDRE(DropsBetweenLayers):
    """Stage 1 keeps k diverse tokens of each picture before the language model; stage 2 drops the rest late in it.

    Stage 2 looks once, at one late decoder layer: where text pays less than `tau` of its attention to vision, and
    vision less than `tau` to text, all visual tokens of the sample leave the layers that follow. It decides by depth
    more than by `tau`: check early and every picture is dropped. Either stage works alone (`keep=None`, `tau=None`).

    Algorithm:
        1. Stage 1 starts with the pivot, by default ``p = argmax_n mean_h cls_attention_h[n]``.
        2. Next token: ``argmin_i sum_{c in S} cos(x_i, x_c)`` over those not in S (``rule="max"``: max for sum).
        3. Until k tokens are in S; they stay in their order.
        4. Stage 2 reads the attention of layer ``floor(7 L / 8) - 1``, mean over heads.
        5. ``R_tv = mean_t sum_n a[t, n]`` of text rows on vision, ``R_vt = mean_n sum_t a[n, t]`` of visual rows on
           text.
        6. If ``R_tv < tau`` and ``R_vt < tau``, all visual tokens of the sample leave the layers that follow.

    Args:
        keep: share (float) or count (int) of a picture's tokens that stage 1 keeps; None leaves stage 1 out.
        rule: ``"sum"`` as in the paper's second version, ``"max"`` (k-center) as in the first.
        pivot: first token: ``"cls"`` (highest CLS attention of the tower's last layer; nearest to the mean where
            there is no CLS token), ``"center"``, ``"farthest"``, ``"random"``, or an index.
        tau: attention mass below which stage 2 drops; None leaves stage 2 out.
        check_layer: 0-based decoder layer at whose end stage 2 looks; floor(7 depth / 8) - 1 by default.
        newlines: row separators of multi-crop pictures: ``"drop"`` them (where `keep` is more than the other tokens,
            the first ones fill it up), or let them be ``"candidates"``.
        scope: what stage 1's `keep` is meant for: each ``"picture"`` or clip, each ``"frame"`` of a clip, each
            ``"part"`` (crops too), or the ``"sample"``, all pictures of a prompt together.
        positions: ``"renumber"`` or ``"keep"`` the position ids after stage 1; None is the model's default.
        seed: for ``pivot="random"``.
    """

    paper = "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance (2025)"
    arxiv = "2505.18757"
    code = ""
    parity = (
        "no official code; index-exact with an independent reference of algorithm 1; stage 2 equals masking (todre_*)"
    )
    deviations = (
        "No official code exists; the layer base, the extent of the text and the position policy are our reading.",
        "Text means the rows behind the picture: with the picture first, vision cannot see them and that ratio is 0.",
        "rule='max' is inferred from the abstract of the first version.",
        "The pivot averages CLS attention over heads (the formula has one head).",
        "Keys and values of dropped tokens stay cached in the layers below the check.",
    )

    aliases = (Alias("k", "keep"), Alias("threshold", "tau"))
    budget_parameter = "keep"
    counted = "tau=none"

    keep: float | int | None = 0.1
    rule: str = "sum"
    pivot: str | int = "cls"
    tau: float | None = 0.1
    check_layer: int | None = None
    newlines: str = "drop"
    scope: str = "picture"  # type: ignore[misc]  # what the core reads of every method, here a setting
    positions: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is None and self.tau is None:
            raise ParameterError("ToDRE: keep=None and tau=None leave nothing to do")
        if self.keep is not None:
            check_keep(self.keep, "ToDRE")
        if self.tau is not None:
            check_range(self.tau, "ToDRE", "tau", 0, 1)
        check_choice(self.rule, "ToDRE", "rule", ("sum", "max"))
        if isinstance(self.pivot, str):
            check_choice(self.pivot, "ToDRE", "pivot", PIVOTS)
        else:
            check_range(self.pivot, "ToDRE", "pivot", 0, kind=int)
        check_layer(self.check_layer, "ToDRE", "check_layer")
        check_choice(self.newlines, "ToDRE", "newlines", ("drop", "candidates"))
        check_choice(self.scope, "ToDRE", "scope", BUDGET_SCOPES)
        check_choice(self.positions, "ToDRE", "positions", (None, "renumber", "keep"))
        check_range(self.seed, "ToDRE", "seed", kind=int)

    def fitted(self, layout: Layout) -> Method | None:
        """Its check at the same share of the layers where tokens may leave."""
        if self.check_layer is not None:
            return None
        return replace(self, check_layer=_late(layout.stages["decoder"].room()))

    def sites(self, layout: Layout) -> list[Site]:
        """Stage 1 at ``projected``, stage 2 at the end of the check layer."""
        sites = []
        if self.keep is not None:
            layout.stage("projected", "ToDRE")
            attention = layout.gives("vision", "cls_attention", later=True) and self.pivot == "cls"
            first = ("cls_attention@vision:-1",) if attention else ()
            sites.append(Site("projected", needs=first, positions=self.positions, scope=self.scope))
        if self.tau is not None:
            depth = layout.stage("decoder", "ToDRE").depth
            layer = _late(depth) if self.check_layer is None else self.check_layer
            needs = ("text_attention", "attention_to_text")
            sites += [
                Site("decoder", i, "end", needs, positions="keep", scope="sample")
                for i in layout.layers("decoder", layer, "ToDRE")
            ]
        return sites

    def reduce(self, view: TokenView) -> Reduction | None:
        """Stage 1 or 2, by the site."""
        return self._select(view) if view.site.stage == "projected" else self._drop(view)

    def count(self, counts: Counts) -> int | None:
        """Stage 1 as `keep` says; stage 2 depends on content.

        Raises:
            ParameterError: the pivot is the index of a token that does not exist.
        """
        if counts.site.stage != "projected":
            return None
        k = counts.n if self.keep is None else keep_count(self.keep, counts.n)
        if k < counts.n:
            _check_pivot(self.pivot, counts.n)
        return k

    def _select(self, view: TokenView) -> Reduction | None:
        n = view.tokens.shape[1]
        k = self.count(view.counts)
        if k is None or k >= n or view.part is None:
            return None
        separator = view.part < 0
        candidates = ~separator if self.newlines == "drop" else torch.ones_like(separator)
        thumbnail = view.part == 0
        # AnyRes starts in the thumbnail; pictures without one start anywhere but in a separator.
        starts = torch.where(thumbnail.any(1, keepdim=True), thumbnail, ~separator)
        attention = view.maybe("cls_attention@vision:-1") if self.pivot == "cls" else None
        pivot = pivot_of(view.tokens, self.pivot, starts, attention, self.seed)
        keep, _ = diverse_subset(view.tokens, k, pivot, rule=self.rule, valid=candidates)
        return Reduction(keep)

    def _drop(self, view: TokenView) -> Reduction | None:
        text = view.maybe("text_attention")
        if text is None or self.tau is None or text.shape[2] == 0:
            return None
        to_vision, to_text = relevance(text, view.signal("attention_to_text"))
        drop = (to_vision < self.tau) & (to_text < self.tau)
        batch, n, _ = view.tokens.shape
        everything = torch.arange(n, device=view.tokens.device).expand(batch, n)
        return Reduction(everything, valid=(~drop).unsqueeze(1).expand(batch, n))
