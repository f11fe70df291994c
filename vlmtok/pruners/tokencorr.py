"""Token-level correlation, approximate: crops whose patches repeat keep fewer, by the class token's attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import chosen_first, ranked
from ..core.settings import check_choice, check_keep, check_layer, check_range, keep_count
from ..core.site import SEPARATORS, Counts, Layout, Site
from ..core.tower_scores import ScoredByTower
from ..core.view import TokenView

LAST = "keys@vision:-1"


def repeated(keys: Tensor, threshold: float, counterparts: int) -> Tensor:
    """Patches that have many alike in their crop.

    Args:
        keys: `[B, N, d]`, any floating dtype.
        threshold: cosine above which two are alike.
        counterparts: how many others must be alike.

    Returns:
        bool `[B, N]`; a key of zeros, or with NaN, is like none.
    """
    with kernels.exact(keys.device):
        unit = kernels.unit_rows(keys).nan_to_num(0.0)
        alike = (unit @ unit.transpose(1, 2) > threshold).sum(-1)
    return alike - (unit.square().sum(-1) > threshold).long() >= counterparts


def local_and_global(shallow: Tensor, deep: Tensor, count: Tensor) -> Tensor:
    """Half of the tokens by attention of a shallow layer, the rest by that of a deep one.

    Args:
        shallow: `[B, N]`.
        deep: `[B, N]`.
        count: int64 `[B]`, how many in all, at most N.

    Returns:
        bool `[B, N]`, `count` of each row; the lowest index wins a tie, NaN loses.
    """
    first = ranked(shallow).argsort(dim=1) < (count // 2)[:, None]
    order = ranked(deep)
    # Those of the first half go behind NaN, so that none is counted twice.
    order = order.gather(1, first.gather(1, order).long().argsort(dim=1, stable=True))
    return first | (order.argsort(dim=1) < (count - count // 2)[:, None])


@register_method
@dataclass(eq=False)
class TokenCorr(ScoredByTower):
    """Keeps fewer tokens of crops whose patches repeat: approximate, since the paper's code is not public.

    Made for documents in many crops, where most of a crop is blank. Everything below that the abstract does not say is
    assumed, and a parameter. A tower without a class token gives the attention that a token receives from all others.

    Algorithm:
        1. A patch is repetitive where at least `counterparts` others have keys of cosine above `threshold`.
        2. A crop's density is one minus its share of repetitive patches; ``k = max(1, round(density N))``.
        3. Half of the k tokens are those of highest class-token attention in a shallow layer, the rest in the last one.
        4. They keep the order of the picture.

    Args:
        keep: None lets each crop's density decide, so that rows are ragged; a share (float) or count (int) of tokens
            fixes it.
        threshold: cosine of the tower's last keys (mean over heads) above which two patches are alike.
        counterparts: other patches that must be alike.
        shallow: 0-based tower layer of the local half, negative from the end; None is a quarter of the depth.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"`` or
            ``"keep"``.
    """

    paper = "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding (2024)"
    arxiv = "2407.14439"
    code = ""
    parity = "approximate: no public code; the paper's abstract only"
    deviations = (
        "Threshold, counterparts, layers and rounding are assumed; a fixed `keep` is ours.",
        "The paper samples tokens by their attention; here those of highest attention stay, so that runs are alike.",
        "DocOwl, the paper's model, is no family here; crops of LLaVA-NeXT and InternVL are what it is for.",
    )
    caveats = (
        "On tiny-llava it loses to DivPrune at equal tokens (1,000 questions): 68.7 % against 90.4 % at 10 of 144 "
        "(threshold=0.8), 84.9 % against 98.3 % at 23 (threshold=0.85); Random answers 37.8 and 63.7 %. Counts by "
        "density do not help there: the same numbers fixed by keep answer 73.0 and 86.1 %.",
    )
    beside = ("keys",)
    budget_parameter = "keep"
    counted = "keep=0.34"  # the paper's mean compression is about 66 percent

    keep: float | int | None = None
    threshold: float = 0.8
    counterparts: int = 1
    shallow: int | None = None
    separators: str = "drop"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep, "TokenCorr")
        check_range(self.threshold, "TokenCorr", "threshold", -1, 1)
        check_range(self.counterparts, "TokenCorr", "counterparts", 1, kind=int)
        check_layer(self.shallow, "TokenCorr", "shallow")
        check_choice(self.separators, "TokenCorr", "separators", SEPARATORS)

    def sites(self, layout: Layout) -> list[Site]:
        """What the projector gets, or what it made where that reaches the language model with its attention."""
        name, stage = self.place(layout)
        layer = layout.stages["vision"].depth // 4 if self.shallow is None else self.shallow
        separators = self.separators if stage == "projected" else "keep"
        needs = (f"{name}@vision:{layer}", f"{name}@vision:-1", LAST)
        return [Site(stage, needs=needs, separators=separators)]

    def remarks(self, layout: Layout) -> list[str]:
        """Which stage it took, and that it is approximate."""
        return [*super().remarks(layout), "TokenCorr is approximate: the paper's code is not public"]

    def reduce(self, view: TokenView) -> Reduction | None:
        """As many tokens of each row as its patches differ, or as `keep` says; slots in the order of the tokens."""
        n, k = view.counts.n, self.count(view.counts)
        if k == n:
            return None
        shallow, deep = (_mean(view.signal(name)) for name in view.site.needs[:2])
        if k is None:
            density = 1.0 - repeated(view.signal(LAST), self.threshold, self.counterparts).double().mean(1)
            count = (density * n + 0.5).floor().to(torch.int64).clamp(1, n)
        else:
            count = torch.full((shallow.shape[0],), k, dtype=torch.int64, device=shallow.device)
        chosen = local_and_global(shallow, deep, count)
        slots, valid = chosen_first(chosen)
        return Reduction(slots, valid=valid) if k is None else Reduction(slots[:, :k])

    def count(self, counts: Counts) -> int | None:
        """As `keep` says; None where the picture decides."""
        if self.keep is not None:
            return keep_count(self.keep, counts.n)
        return None if counts.n > 1 else counts.n


def _mean(attention: Tensor) -> Tensor:
    """The class token's attention `[B, H, N]` as its mean over heads; what tokens receive, `[B, N]`, as it is."""
    return attention.float().mean(1) if attention.dim() == 3 else attention.float()
