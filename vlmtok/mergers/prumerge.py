"""LLaVA-PruMerge: keep the outliers of class-token attention and let each gather its most similar tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import ranked
from ..core.settings import check_choice, check_flag, check_keep, check_range
from ..core.site import SEPARATORS, Counts, Layout, Site
from ..core.view import TokenView

CLASSED = tuple(f"{name}@vision:-1" for name in ("protected_queries", "protected_keys", "keys_full"))
LATE = ("flat_attention@vision:-1", "turned_keys_full@vision:-1")
"""What a class token's scores are made of, and scores and keys of towers without one, and behind the projector."""


def stage_of(by: str, layout: Layout) -> str:
    """Where `by` takes tokens of a family: what the projector gets, or what it made, with what `LATE` names."""
    return layout.feature_stage(by, [name.partition("@")[0] for name in LATE])


def class_scores(query: Tensor, keys: Tensor, protected_keys: Tensor) -> Tensor:
    """Attention of the class token on the patches, as one head over the full width (arXiv 2403.15388).

    Args:
        query: `[B, D]`, of the class token, all heads side by side.
        keys: `[B, N, D]`, of the patches.
        protected_keys: `[B, P, D]`, of the class token and other tokens that the layer sees.

    Returns:
        fp32 `[B, N]`: softmax over all P + N keys, cut to the patches.
    """
    row = torch.cat([protected_keys, keys], 1).unsqueeze(1)
    scale = query.shape[-1] ** -0.5
    return kernels.attention_rows(query[:, None, None], row, scale=scale)[:, 0, 0, protected_keys.shape[1] :]


def outlier_count(score: Tensor) -> Tensor:
    """How many scores of a row lie above the third quartile by more than 1.5 interquartile ranges.

    Args:
        score: fp32 `[B, N]`.

    Returns:
        int64 `[B]`, at most N // 4.
    """
    n = score.shape[1]
    rising = score.sort(dim=1).values

    def quantile(q: float) -> Tensor:
        place = q * (n - 1)
        low = int(place)
        a, b = rising[:, low], rising[:, min(low + 1, n - 1)]
        return a + (b - a) * (place - low)

    first, third = quantile(0.25), quantile(0.75)
    limit = third + 1.5 * (third - first)
    return (score > limit.unsqueeze(1)).sum(1)


def adaptive_choice(score: Tensor, count: Tensor, plus: bool = False) -> tuple[Tensor, Tensor]:
    """The tokens that stay, in the released order: highest scores first, then evenly spaced ones.

    Args:
        score: `[B, N]`, class-token attention.
        count: int64 `[B]`, how many by score.
        plus: add every s-th token, s = N // count // 3 (PruMerge+), a third of the mean distance of the first ones.

    Returns:
        All tokens, those that stay first, int64 `[B, N]`, and how many stay, int64 `[B]`. The lowest index wins a tie,
        NaN loses.
    """
    n = score.shape[1]
    order = ranked(score)
    if not plus:
        return order, count
    place = torch.arange(n, device=score.device)
    top = (place < count.unsqueeze(1)).to(torch.int64)
    top = torch.zeros_like(order).scatter(1, order, top).bool()
    # In float64 as released, where 1 / (count / N) can fall short of a whole number. No outlier counts as one.
    ratio = count.clamp(min=1).to(torch.float64) / n
    stride = (1.0 / ratio).floor().div(3).floor().to(torch.int64).clamp(min=1)
    spaced = ~top & (place % stride.unsqueeze(1) == 0)
    rank = order.argsort(dim=1)
    key = torch.where(top, rank, torch.where(spaced, n + place, 2 * n + place))
    return key.argsort(dim=1), count + spaced.sum(1)


def prune_and_merge(
    keys: Tensor, score: Tensor, order: Tensor, count: Tensor, slots: int, neighbours: int = 32
) -> Reduction:
    """Lets each token that stays gather its most similar others, and one more slot all that do not stay.

    Args:
        keys: `[B, N, D]`, any floating dtype.
        score: fp32 `[B, N]`, weights with which tokens join.
        order: int64 `[B, N]`, all tokens, those that stay first.
        count: int64 `[B]`, how many stay, at most `slots`.
        slots: at most N.
        neighbours: how many join each; fewer where there are fewer others. They may stay themselves.

    Returns:
        A ragged reduction: `count` tokens in their order, the merged one (unless every slot has a token of its own),
        and invalid slots.
    """
    batch, n = score.shape
    kept = order[:, :slots]
    near = min(neighbours, n - 1)
    with kernels.exact(keys.device):
        unit = kernels.unit_rows(keys).nan_to_num(0.0)
        similarity = (kernels.take_rows(unit, kept) @ unit.transpose(1, 2)).scatter(
            2, kept.unsqueeze(-1), float("-inf")
        )
        joining = similarity.argsort(dim=2, descending=True, stable=True)[:, :, :near]
    slot = torch.arange(slots, device=keys.device)
    limit = count.unsqueeze(1)
    to = torch.where(slot < limit, slot, -1).unsqueeze(-1).expand(batch, slots, near)
    # The first token that does not stay stands for the merged one; all behind it join it.
    merged = torch.where(order.argsort(dim=1) > limit, limit, -1)
    src = torch.cat([joining.flatten(1), torch.arange(n, device=keys.device).expand(batch, n)], 1)
    dst = torch.cat([to.flatten(1), merged], 1)
    keep_weight = torch.where(slot == limit, score.gather(1, kept), 1.0)
    return Reduction(kept, src, dst, keep_weight, score.gather(1, src), slot <= limit)


def in_order(reduction: Reduction) -> Reduction:
    """The same with its slots by the places of the tokens that represent them, invalid ones last.

    Args:
        reduction: from `prune_and_merge`.
    """
    keep, src, dst, valid = reduction.keep, reduction.src, reduction.dst, reduction.valid
    assert src is not None and dst is not None and valid is not None and reduction.keep_weight is not None
    order = torch.where(valid, keep, keep.amax() + 1).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    return replace(
        reduction,
        keep=keep.gather(1, order),
        dst=torch.where(dst >= 0, rank.gather(1, dst.clamp(min=0)), -1),
        keep_weight=reduction.keep_weight.gather(1, order),
        valid=valid.gather(1, order),
    )


@register_method
@dataclass(eq=False)
class PruMerge(Method):
    """Chooses before the projector how many tokens a crop needs, keeps them, and merges the others into them.

    Outliers of the class token's attention in the tower's last layer stay, by falling attention. Each adds its 32
    neighbours by key, weighted by their attention, and one more token is the sum of all that do not stay. The class
    token itself does not go on. Features are those that the projector reads.

    A tower without a class token gives the mean attention that a token receives, of one head over the full width, as
    released ports do. Where nothing can leave before the projector, tokens are chosen and merged at the language
    model's input, one thumbnail, crop or frame at a time: in the picture's order, the merged token at the place of the
    best one that does not stay.

    Algorithm:
        1. In the tower's last layer ``a = softmax(q_cls K^T / sqrt(D))``, one head of full width D, cut to the patches.
        2. The k highest stay: as many as ``a_i > Q3 + 1.5 (Q3 - Q1)``, Q the quartiles of a crop, or as `keep` says.
        3. PruMerge+ adds every s-th place, ``s = max(1, N // k // 3)``.
        4. Each that stays gathers: ``y_i = x_i + sum_j a_j x_j`` over its `neighbours` j of highest ``cos(K_i, K_j)``.
        5. One slot more: ``sum_j a_j x_j`` over all that do not stay.

    Args:
        keep: None lets each crop's outliers decide, so that rows are ragged; a share (float, rounded down as released)
            or a count (int) of tokens fixes it. One merged token comes on top.
        plus: PruMerge+: also keep evenly spaced tokens, about three times as many.
        neighbours: tokens that join each kept one.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"`` or
            ``"keep"``.
    """

    paper = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (ICCV 2025)"
    arxiv = "2403.15388"
    code = "https://github.com/42Shawn/LLaVA-PruMerge"
    parity = "index-exact with the released selection, merged tokens 1e-5 (prumerge_*)"
    deviations = (
        "Each crop has its own number of outliers; the release pools them over the batch.",
        "A picture without outliers keeps the merged token, and with plus=True three or four spaced ones; the release "
        "divides by zero.",
        "Fewer than 32 other tokens all join; the release fails. Where every token stays, there is no merged one.",
        "Spaced tokens reach to the end of any grid; the release stops at patch 575.",
        "plus=True with a fixed keep uses the spacing of the adaptive form; the release's training branch differs.",
        "Ports to Qwen2-VL and Qwen2.5-VL leave the merged token out, fill a fixed number with spaced ones and rank "
        "all pictures of a call together; here the rules are the same on every model.",
    )
    scope = "part"
    aliases = (Alias("k", "neighbours"), Alias("reduction_ratio", "keep", "the released code"))
    budget_parameter = "keep"
    counted = "keep=0.055"  # 32 of 576 with the merged one, the paper's mean on LLaVA-1.5

    keep: float | int | None = None
    plus: bool = False
    neighbours: int = 32
    separators: str = "drop"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep, "PruMerge")
        check_flag(self.plus, "PruMerge", "plus")
        check_choice(self.separators, "PruMerge", "separators", SEPARATORS)
        check_range(self.neighbours, "PruMerge", "neighbours", 1, kind=int)

    def sites(self, layout: Layout) -> list[Site]:
        """What the projector gets, or what it made, with projections of the tower's last layer."""
        stage = stage_of("PruMerge", layout)
        if stage == "projected":
            return [Site(stage, needs=LATE, separators=self.separators)]
        return [Site(stage, needs=CLASSED if layout.gives("vision", "cls_attention") else LATE)]

    def remarks(self, layout: Layout) -> list[str]:
        """Which stage it took where that is not the papers', and who scores where no class token does."""
        stage = stage_of("PruMerge", layout)
        said = layout.said_of_stage("PruMerge", stage)
        if not layout.gives("vision", "cls_attention"):
            said.append(
                f"PruMerge scores tokens by the attention that they receive: the tower of {layout.family} has no class "
                "token"
            )
        return said

    def reduce(self, view: TokenView) -> Reduction | None:
        """Slots: kept tokens, the merged one, and invalid ones where rows are ragged."""
        batch, n, _ = view.tokens.shape
        fixed = self._fixed(n)
        if n < 2 or fixed == n:
            return None
        if view.has(LATE[0]):
            score, keys = view.signal(LATE[0]).float(), view.signal(LATE[1])
        else:
            keys = view.signal("keys_full@vision:-1")
            query = view.signal("protected_queries@vision:-1")[:, 0]
            score = class_scores(query, keys, view.signal("protected_keys@vision:-1"))
        if fixed is None:
            # N * (count / N) in float64 as released: for a few N that is one less than the count.
            ratio = outlier_count(score).to(torch.float64) / n
            count = (ratio * n).to(torch.int64)
        else:
            count = torch.full((batch,), fixed, dtype=torch.int64, device=score.device)
        order, count = adaptive_choice(score, count, self.plus)
        most = n if self.plus else (n // 4 if fixed is None else fixed) + 1
        reduction = prune_and_merge(keys, score, order, count, most, self.neighbours)
        if view.site.stage == "projected":
            reduction = in_order(reduction)
        return reduction if self.count(view.counts) is None else replace(reduction, valid=None)

    def count(self, counts: Counts) -> int | None:
        """A fixed `keep` and the merged token; None where the picture decides."""
        fixed = self._fixed(counts.n)
        if counts.n < 2 or fixed == counts.n:
            return counts.n
        return None if fixed is None or self.plus else fixed + 1

    def _fixed(self, n: int) -> int | None:
        if self.keep is None:
            return None
        return min(n, int(n * self.keep) if isinstance(self.keep, float) else self.keep)
