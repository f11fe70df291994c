"""KVRandom: the baseline that an eviction from caches has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.cache_scores import ScoredCache
from ..core.registry import register_method
from ..core.selection import random_order
from ..core.settings import check_range
from ..core.view import TokenView


@register_method
@dataclass(eq=False)
class KVRandom(ScoredCache):
    """Keeps visual entries drawn at random in the cache of every layer, behind the prefill.

    One draw for each (seed, layer, N), the same for every view row; draws of layers differ. One draw can be lucky:
    average over seeds where you quote it.

    Algorithm:
        1. A generator is seeded with the SHA-256 of seed, site and N.
        2. It draws one order of the N places; every view row takes the same.
        3. The entries at the first k places of that order stay in the layer's cache.

    Args:
        keep: share (float) or count (int) of a view row's entries that stay in each layer.
        layers: 0-based layers whose caches lose entries; negatives count from the end. None is all that can.
        seed: of the draw.
        scope: what `keep` is meant for: each key-value ``"head"`` of a picture (all heads draw alike), ``"picture"``,
            ``"frame"``, ``"part"`` or the ``"sample"``.
    """

    name = "kv_random"
    paper = "baseline"
    parity = "seeded; no reference"

    seed: int = 0
    scope: str = "picture"  # type: ignore[misc]  # what the core reads of every method, here a setting

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.seed, "KVRandom", "seed", kind=int)

    def score(self, view: TokenView) -> Tensor:
        """Minus the place in the order drawn, fp32 `[B, N]`."""
        batch, n, _ = view.tokens.shape
        place = random_order(n, self.seed, str(view.site)).argsort()
        return -place.float().to(view.tokens.device).expand(batch, n)
