"""KVNorm: keep the cache entries whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.cache_scores import ScoredCache, over_heads
from ..core.registry import register_method
from ..core.view import TokenView


def short_keys(keys: Tensor) -> Tensor:
    """Minus the L2 norm of keys (arXiv 2406.11430).

    Args:
        keys: `[..., d]`, as cached; rotary positions do not change a norm.

    Returns:
        fp32 `[...]`, higher is shorter.
    """
    return -keys.float().norm(dim=-1)


@register_method
@dataclass(eq=False)
class KVNorm(ScoredCache):
    """Keeps the visual entries of smallest key norm in the cache of every layer, behind the prefill.

    No attention is read, so that the choice costs next to nothing: keys of small norm are those that attract attention.

    Algorithm:
        1. ``s_n = -||k_n||_2`` of each cached key, head by head.
        2. Unless `scope` is ``"head"``, the mean over heads.
        3. The k entries of highest s stay in the layer's cache, keys and values as they are.

    Args:
        keep: share (float) or count (int) of a view row's entries that stay in each layer.
        layers: 0-based layers whose caches lose entries; negatives count from the end. None is all that can.
        scope: what `keep` is meant for: each key-value ``"head"`` of a picture by itself, or all heads alike for each
            ``"picture"``, ``"frame"``, ``"part"`` or the ``"sample"``.
    """

    name = "kv_norm"
    paper = "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (EMNLP 2024)"
    arxiv = "2406.11430"
    code = "https://github.com/alessiodevoto/l2compress"
    parity = "by hand; the formula is one line"
    deviations = (
        "Visual entries alone leave, once, behind the prefill; in the release those of any token do.",
        "Every layer loses entries unless `layers` says which; the release's example leaves layers 0 and 1 whole.",
        "Equal norms go to the lowest index.",
    )
    caveats = (
        "Worse than chance on scenes-llava: 60 to 64 % of 100 scenes-vqa questions at 50 to 10 % of the cache's bytes, "
        "where random entries keep 95 to 71 %.",
    )
    needs: ClassVar[tuple[str, ...]] = ("keys_cached",)

    scope: str = "head"  # type: ignore[misc]  # what the core reads of every method, here a setting

    def score(self, view: TokenView) -> Tensor:
        """Minus the norms, fp32 `[B, N]`."""
        return over_heads(short_keys(view.signal("keys_cached")))
