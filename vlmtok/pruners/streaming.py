"""Streaming: keep the first entries of a cache and the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.cache_scores import ScoredCache
from ..core.registry import register_method
from ..core.settings import check_range
from ..core.view import TokenView


@register_method
@dataclass(eq=False)
class Streaming(ScoredCache):
    """Keeps the first visual entries (attention sinks) and the last ones in the cache of every layer.

    Nothing is looked at: the baseline of a window.

    Algorithm:
        1. The entries of a view row stand in the order of their columns.
        2. The first ``min(sinks, k)`` stay.
        3. The last ones fill up to k.

    Args:
        keep: share (float) or count (int) of a view row's entries that stay in each layer, sinks included.
        layers: 0-based layers whose caches lose entries; negatives count from the end. None is all that can.
        sinks: first entries that stay.
        scope: what `keep` is meant for: the ``"sample"``, all pictures of a prompt as one row of entries, or each
            ``"picture"``, ``"frame"``, ``"part"`` or key-value ``"head"`` of a picture (all heads keep the same).
    """

    paper = "Efficient Streaming Language Models with Attention Sinks (ICLR 2024)"
    arxiv = "2309.17453"
    code = "https://github.com/mit-han-lab/streaming-llm"
    parity = "by hand; no score is involved"
    deviations = (
        "It acts once, behind the prefill, on visual entries; in the paper the window moves on with every token.",
        "Kept entries keep their positions; in the paper positions are counted anew within the cache.",
    )
    caveats = (
        "It knows places alone: on scenes-llava 81, 73 and 66 % of 100 scenes-vqa questions at 50, 25 and 10 % of the "
        "cache's bytes, where random entries keep 95, 83 and 71.",
        "Text is never touched: the prompt's own sinks and its end stay anyway, so that the window lies over visual "
        "entries in their order, rows of patches from the top, of which the last are the bottom of the picture.",
    )

    sinks: int = 4
    scope: str = "sample"  # type: ignore[misc]  # what the core reads of every method, here a setting

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.sinks, "Streaming", "sinks", 0, kind=int)

    def score(self, view: TokenView) -> Tensor:
        """The place in the row, sinks above all others, fp32 `[B, N]`."""
        batch, n, _ = view.tokens.shape
        place = torch.arange(n, device=view.tokens.device)
        return torch.where(place < self.sinks, 2 * n - place, place).float().expand(batch, n)
