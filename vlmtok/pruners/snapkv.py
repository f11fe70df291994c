"""SnapKV: keep the cache entries that the end of the prompt attends to, with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..core.cache_scores import ScoredCache, over_heads
from ..core.registry import register_method
from ..core.settings import check_choice, check_range
from ..core.view import TokenView
from ..errors import ParameterError

POOLS = ("mean", "max")


def pooled(score: Tensor, kernel: int, pool: str) -> Tensor:
    """A score that looks at neighbours, so that entries stay in clusters (arXiv 2404.14469).

    Args:
        score: `[B, N]`, any floating dtype.
        kernel: width of the window around an entry, odd.
        pool: ``mean`` or ``max``.

    Returns:
        fp32 `[B, N]`; at the ends the window is what there is of it. NaN stays NaN, and counts for none of its
        neighbours.
    """
    lost, wide = score.isnan(), score.double().unsqueeze(1)  # means of equal numbers are equal again
    half = kernel // 2
    if pool == "max":
        wide = wide.masked_fill(lost.unsqueeze(1), float("-inf"))
        found = functional.max_pool1d(wide, kernel, 1, half)
    else:
        table = torch.cat([wide.masked_fill(lost.unsqueeze(1), 0.0), (~lost).unsqueeze(1).double()], 1)
        total, count = functional.avg_pool1d(table, kernel, 1, half).unbind(1)
        found = (total / count).unsqueeze(1)
    return found.squeeze(1).float().masked_fill(lost, float("nan"))


@register_method
@dataclass(eq=False)
class SnapKV(ScoredCache):
    """Keeps the visual entries that the last rows of the prompt attend to, head by head, behind the prefill.

    What the end of a long prompt, the question, looks at is what generation will look at.

    Algorithm:
        1. ``s_n``: attention that entry n gets, summed over the last `window` rows of the prompt, head by head.
        2. ``s'_n``: mean (or maximum) of s over the `kernel` entries around n.
        3. The k entries of highest s' stay in the head's cache of the layer.

    Args:
        keep: share (float) or count (int) of a view row's entries that stay in each layer.
        layers: 0-based layers whose caches lose entries; negatives count from the end. None is all that can.
        window: last rows of the prompt that look, at least 1.
        kernel: entries that pooling looks at, odd; 1 pools nothing.
        pool: ``"mean"`` or ``"max"``.
        scope: what `keep` is meant for: each key-value ``"head"`` of a picture by itself, or all heads alike for each
            ``"picture"``, ``"frame"``, ``"part"`` or the ``"sample"``.
    """

    paper = "SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS 2024)"
    arxiv = "2404.14469"
    code = "https://github.com/FasterDecoding/SnapKV"
    parity = "by hand: a loop of the formula"
    deviations = (
        "Visual entries alone leave; the release budgets the whole prompt, and its window is kept because it is there.",
        "The window is the last rows of the prompt, whether they are text or not: a template's end is part of it.",
        "Pooling runs along visual entries in their order, over the ends of rows of patches, and no text lies between.",
        "At the ends of a view row the mean is over the entries that are there; the release counts zeros beside them.",
        "Heads that share keys choose together, by their mean; the release repeats keys and lets each choose.",
        "Scores are fp32; the release rounds attention to the model's dtype. Equal scores go to the lowest index.",
    )
    needs: ClassVar[tuple[str, ...]] = ("recent_mass",)

    window: int = 32
    kernel: int = 5
    pool: str = "mean"
    scope: str = "head"  # type: ignore[misc]  # what the core reads of every method, here a setting

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.window, "SnapKV", "window", 1, kind=int)
        check_range(self.kernel, "SnapKV", "kernel", 1, kind=int)
        if not self.kernel % 2:
            raise ParameterError(f"SnapKV: kernel={self.kernel} must be odd, so that an entry is its middle")
        check_choice(self.pool, "SnapKV", "pool", POOLS)

    def site_settings(self) -> dict[str, Any]:
        """The window that looks."""
        return {"window": self.window}

    def score(self, view: TokenView) -> Tensor:
        """Attention of the window, pooled, fp32 `[B, N]`."""
        return pooled(over_heads(view.signal("recent_mass")), self.kernel, self.pool)
