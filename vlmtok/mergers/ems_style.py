"""EMSStyle: first evict, then merge, head by head: our reading of EMS, not the paper's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.cache_scores import ScoredCache, shares
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import ranked
from ..core.settings import check_flag, check_range, keep_count
from ..core.view import TokenView


def joined(keys: Tensor, order: Tensor, k: int, more: int, tau: float) -> Reduction:
    """The best entries stay as centres, the next ones join the centre that resembles them, or go.

    Args:
        keys: `[B, N, d]`, any floating dtype.
        order: int64 `[B, N]`, entries by falling score.
        k: centres.
        more: candidates behind them, at most N - k.
        tau: least cosine of keys with which a candidate joins.

    Returns:
        Slots are the centres in their order; of candidates that go `dst` is -1. The first centre wins a tie; a key with
        NaN joins nothing and is joined by nothing.
    """
    keep, src = order[:, :k].sort(dim=1).values, order[:, k : k + more]
    with kernels.exact(keys.device):
        unit = kernels.unit_rows(keys)
        cosine = kernels.take_rows(unit, src) @ kernels.take_rows(unit, keep).transpose(1, 2)
    cosine = torch.where(cosine.isnan(), float("-inf"), cosine)
    best = cosine.amax(2)
    return Reduction(keep, src, torch.where(best >= tau, cosine.argmax(2), -1))


@register_method
@dataclass(eq=False)
class EMSStyle(ScoredCache):
    """Evict, then merge, head by head, in the style of EMS: approximate, since the paper's method section is not known.

    A score of all rows of the prompt and of its last ones says which visual entries stay in a head's cache; the next
    ones join the nearest of these, if it is near enough. From EMS: that both scores enter, that heads act by
    themselves, the order (evict, then merge), and that entries that resemble no other are let go without a shape that
    depends on it. Everything else is an assumption: how scores are normalised and weighed, `window`, `tau`, how many
    are candidates, and what resembles what.

    Algorithm:
        1. ``G_n``: attention that entry n gets from all rows, over the rows that could see it; ``R_n``: from the last
           `window` rows. Each is divided by its sum over the head's visual entries; ``s_n = G_n + R_n``.
        2. The k entries of highest s are centres; the next min(k, N - k) are candidates; the rest goes.
        3. A candidate joins the centre with the largest cosine of cached keys if it is at least `tau`, else it goes.
        4. A centre keeps its key; its value is the size-weighted mean of its members' values.

    Args:
        keep: share (float) or count (int) of a head's visual entries that stay as centres in each layer.
        layers: 0-based layers whose caches lose entries; negatives count from the end. None is all that can.
        window: last rows of the prompt that R looks at, at least 1.
        tau: least cosine of keys with which an entry joins, in [-1, 2]; above 1 none does.
        proportional: whether a merged entry gets + log(size) in later attention.
    """

    name = "ems_style"
    paper = "in the style of: EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression (2025)"
    arxiv = "2412.08521"
    parity = "none possible: by hand, a loop over heads of the steps above"
    deviations = (
        "Approximate: the method section of EMS is not public to us, and no code is. It is not EMS, and no figure of "
        "that paper belongs to it.",
        "Assumed: normalisation and equal weight of the two scores, a window of 32, no pooling, as many candidates as "
        "centres, cosines of cached keys, tau = 0.6.",
        "Cached keys are turned by their positions, so that their cosine falls with distance, too.",
        "Visual entries alone leave, once, behind the prefill; what EMS does while it decodes is left out.",
    )
    scope = "head"
    needs: ClassVar[tuple[str, ...]] = ("attention_mass", "attention_rows", "recent_mass", "keys_cached")

    window: int = 32
    tau: float = 0.6
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.window, "EMSStyle", "window", 1, kind=int)
        check_range(self.tau, "EMSStyle", "tau", -1, 2)
        check_flag(self.proportional, "EMSStyle", "proportional")

    def site_settings(self) -> dict[str, Any]:
        """The window of the local score."""
        return {"window": self.window}

    def score(self, view: TokenView) -> Tensor:
        """Global and local score, fp32 `[B, N]`."""
        seen = view.signal("attention_mass") / view.signal("attention_rows").clamp(min=1.0)
        return shares(seen) + shares(view.signal("recent_mass"))

    def reduce(self, view: TokenView) -> Reduction | None:
        """Centres, and what joins them."""
        n = view.counts.n
        k = keep_count(self.keep, n)
        if k == n:
            return None
        order = ranked(self.score(view))
        return joined(view.signal("keys_cached"), order, k, min(k, n - k), self.tau)
