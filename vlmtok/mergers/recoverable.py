"""Recoverable Compression: keep outliers of attention and of text similarity, and merge the rest around its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import ranked
from ..core.settings import check_choice, check_range
from ..core.site import SEPARATORS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError, SiteError
from .prumerge import CLASSED, LATE, class_scores, in_order, stage_of

OUTLYING = 1.5
"""Local outlier factor above which a value is an outlier, at either side."""


def outliers(value: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """Outliers of each row by the local outlier factor (LOF) of single numbers.

    A value's density is one over the mean reachability distance of its k nearest others, its factor the mean density of
    these others over its own.

    Args:
        value: `[B, N]`, compared in float64.
        valid: bool `[B, N]`, values that count.
        neighbours: k; one less than the values there are where these are fewer.

    Returns:
        bool `[B, N]`: those whose factor is above 1.5.
    """
    n = value.shape[1]
    most = min(neighbours, n - 1)
    if most < 1:
        return torch.zeros_like(valid)
    wide = value.double()
    gone = ~valid.unsqueeze(1) | torch.eye(n, dtype=torch.bool, device=value.device)
    distance = (wide.unsqueeze(2) - wide.unsqueeze(1)).abs().masked_fill(gone, float("inf"))
    near, who = (part[:, :, :most] for part in distance.sort(dim=2, stable=True))
    k = (valid.sum(1) - 1).clamp(min=1, max=most)
    asked = (torch.arange(most, device=value.device) < k[:, None]).unsqueeze(1)
    furthest = near.gather(2, (k - 1)[:, None, None].expand(-1, n, 1)).squeeze(2)

    def mean(table: Tensor) -> Tensor:
        return torch.where(asked, table, 0.0).sum(2) / k[:, None]

    def of(table: Tensor) -> Tensor:
        return table.unsqueeze(1).expand(-1, n, -1).gather(2, who)

    density = 1.0 / (mean(torch.maximum(near, of(furthest))) + 1e-10)
    return (mean(of(density)) / density > OUTLYING) & valid


def share_of(found: Tensor, n: Tensor | int, of: Tensor | int) -> Tensor:
    """``int(of (found / n))`` in float64, as released: for some numbers one less than `found` where `of` is `n`."""
    return (found.sum(1).double() / n * of).to(torch.int64)


def two_choices(attention: Tensor, relevance: Tensor, neighbours: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that stay, by attention and then by the text (arXiv 2409.01179).

    Args:
        attention: fp32 `[B, N]`, the class token's.
        relevance: fp32 `[B, N]`, similarity with the text.
        neighbours: k of the two outlier factors.

    Returns:
        bool `[B, N]` twice, chosen by attention and by the text, and the relevance in which the former count least.
    """
    n = attention.shape[1]
    every = torch.ones_like(attention, dtype=torch.bool)
    count = share_of(outliers(attention, every, neighbours[0]), n, n)
    visual = ranked(attention).argsort(dim=1) < count[:, None]
    relevance = torch.where(visual, relevance.amin(1, keepdim=True), relevance)
    more = share_of(outliers(relevance, every, neighbours[1]), n, n - count)
    text = ranked(torch.where(visual, float("-inf"), relevance)).argsort(dim=1) < more[:, None]
    return visual, text & ~visual, relevance


def recovered(
    keys: Tensor, attention: Tensor, relevance: Tensor, kept: Tensor, centre: Tensor, neighbours: int, weight: float
) -> Reduction:
    """Kept tokens, centres with what joins them, and the rest as one.

    Args:
        keys: `[B, N, D]`, any floating dtype.
        attention: fp32 `[B, N]`, the weight with which a token joins.
        relevance: fp32 `[B, N]`.
        kept: bool `[B, N]`, tokens that stay as they are.
        centre: bool `[B, N]`, of the others those that gather.
        neighbours: others that join each centre; they may be centres themselves.
        weight: of the relevance beside the cosine of keys.

    Returns:
        A ragged reduction: kept tokens in their order, centres by falling attention, and one more slot for all that are
        neither, where there are centres or nothing is kept.
    """
    batch, n = attention.shape
    place = torch.arange(n, device=keys.device)
    rank = ranked(attention).argsort(dim=1)
    order = torch.where(kept, place, torch.where(centre, n + rank, 2 * n + place)).argsort(dim=1)
    first, last = kept.sum(1, keepdim=True), (kept | centre).sum(1, keepdim=True)
    near = min(neighbours, n - 1)
    with kernels.exact(keys.device):
        unit = kernels.unit_rows(keys).nan_to_num(0.0)
        score = kernels.take_rows(unit, order) @ unit.transpose(1, 2) + weight * relevance.unsqueeze(1)
        score = score.masked_fill(kept.unsqueeze(1), float("-inf")).scatter(2, order.unsqueeze(-1), float("-inf"))
        score = score.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
        values, joining = (part[:, :, :near] for part in score.sort(dim=2, descending=True, stable=True))
    slot = place.expand(batch, n)
    gathers = ((slot >= first) & (slot < last)).unsqueeze(-1) & ~values.isneginf()
    to = torch.where(gathers, slot.unsqueeze(-1), -1)
    rest = (last < n) & ((last > first) | (first == 0))
    behind = torch.where((order.argsort(dim=1) > last) & rest, last, -1)  # the first of the rest stands for it
    src = torch.cat([joining.flatten(1), slot], 1)
    dst = torch.cat([to.flatten(1), behind], 1)
    keep_weight = torch.where(slot == last, attention.gather(1, order), 1.0)
    valid = (slot < last) | ((slot == last) & rest)
    return Reduction(order, src, dst, keep_weight, attention.gather(1, src), valid)


@register_method
@dataclass(eq=False)
class Recoverable(Method):
    """Keeps tokens that stand out in class-token attention or in similarity with the text, and merges the rest.

    How many stay follows from the picture and the question. It needs the signal ``relevance`` of yours, `[B, N]`: for
    LLaVA the cosines of CLIP's projected patches with its embedding of the question, over sqrt(768), to which `weight`
    belongs. Where nothing can leave before the projector, tokens are chosen behind it, crop by crop.

    Algorithm:
        1. ``a = softmax(q_cls K^T / sqrt(C))`` of the tower's last layer, one head of full width, cut to the patches.
        2. The share of outliers of a, by LOF of `lof[0]` neighbours, stays by attention.
        3. Their relevance becomes the least; the share of its outliers (`lof[1]`) of the others stays by relevance.
        4. Of the R others the share of outliers of a (`lof[2]`) are centres, those of highest a.
        5. ``y_c = x_c + sum a_j x_j`` over the `neighbours` j of the others of highest ``cos(k_c, k_j) + weight s_j``.
        6. One slot more: ``sum a_j x_j`` over those of the R that are no centres, where there are centres.

    Args:
        neighbours: tokens that join a centre.
        weight: of the relevance beside the cosine of keys.
        lof: neighbours of the three outlier factors.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"`` or
            ``"keep"``.
    """

    paper = "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text (AAAI 2025)"
    arxiv = "2409.01179"
    code = "https://github.com/banjiuyufen/Recoverable-Compression"
    parity = "selection exact with the release, merged tokens 1e-5 with its description (recoverable_*)"
    deviations = (
        "Centres are a share of the tokens that are left; the release, by a name used twice, takes it of the width of "
        "the features: one centre where the text says six, and an error where the width is larger.",
        "A centre's neighbours are told by keys of the tokens themselves; the release reads keys at places of a list "
        "that is shorter by then, so those of others.",
        "Where nothing is kept and there are no centres, the merged token stays; the release returns nothing.",
        "Fewer than `neighbours` others all join; the release fails below 33. Batches and crops go row by row.",
        "The question's relevance comes from you; the release runs a second CLIP on a prompt that is padded.",
    )
    scope = "part"
    wants = ("relevance",)

    neighbours: int = 32
    weight: float = 50.0
    lof: tuple[int, int, int] = (20, 20, 10)
    separators: str = "drop"

    def __post_init__(self) -> None:
        check_range(self.neighbours, "Recoverable", "neighbours", 1, kind=int)
        check_range(self.weight, "Recoverable", "weight", 0)
        check_choice(self.separators, "Recoverable", "separators", SEPARATORS)
        if not isinstance(self.lof, (tuple, list)) or len(self.lof) != 3:
            raise ParameterError(f"Recoverable: lof={self.lof!r} must be three numbers of neighbours")
        for one in self.lof:
            check_range(one, "Recoverable", "lof", 1, kind=int)

    def sites(self, layout: Layout) -> list[Site]:
        """What the projector gets, or what it made; a tower without a class token is refused."""
        if "vision" in layout.stages and not layout.gives("vision", "cls_attention"):
            raise SiteError(
                f"Recoverable compares patches with a class token, which the tower of {layout.family} lacks"
            )
        stage = stage_of("Recoverable", layout)
        separators = self.separators if stage == "projected" else "keep"
        needs = LATE if stage == "projected" else CLASSED
        return [Site(stage, needs=(*needs, "relevance"), separators=separators)]

    def remarks(self, layout: Layout) -> list[str]:
        """Which stage it took where that is not the papers'."""
        return layout.said_of_stage("Recoverable", stage_of("Recoverable", layout))

    def reduce(self, view: TokenView) -> Reduction | None:
        """Kept tokens, centres and the merged rest; by their places where it acts behind the projector."""
        n = view.counts.n
        if n < 2:
            return None
        relevance = view.signal("relevance").float()
        if view.has(LATE[0]):
            attention, keys = view.signal(LATE[0]).float(), view.signal(LATE[1])
        else:
            keys = view.signal(CLASSED[2])
            attention = class_scores(view.signal(CLASSED[0])[:, 0], keys, view.signal(CLASSED[1]))
        bad = attention.isnan() | relevance.isnan()
        attention = torch.where(bad, 0.0, attention)
        relevance = torch.where(bad, torch.where(bad, float("inf"), relevance).amin(1, keepdim=True), relevance)
        relevance = relevance.nan_to_num(posinf=0.0)
        visual, text, relevance = two_choices(attention, relevance, (self.lof[0], self.lof[1]))
        kept = (visual | text) & ~bad
        left = ~kept
        count = share_of(outliers(attention, left, self.lof[2]), left.sum(1).clamp(min=1), left.sum(1))
        centre = ranked(torch.where(left & ~bad, attention, float("-inf"))).argsort(dim=1) < count[:, None]
        reduction = recovered(keys, attention, relevance, kept, centre & left & ~bad, self.neighbours, self.weight)
        return in_order(reduction) if view.site.stage == "projected" else reduction

    def count(self, counts: Counts) -> int | None:
        """It depends on picture and text."""
        return None if counts.n > 1 else counts.n
