"""TCA's condensation of tokens: how many leave where, which, and into what."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.reduction import Reduction


@dataclass(frozen=True)
class Condensation:
    """How many patches of a layer go where.

    Attributes:
        kept: stay as they are, by falling score.
        middle: are condensed to `centers` tokens.
        fused: the lowest, summed into one token (0 leaves that token out).
        centers: coreset centres.
    """

    kept: int
    middle: int
    fused: int
    centers: int

    @property
    def slots(self) -> int:
        """Tokens that leave the layer, CLS not counted."""
        return self.kept + self.centers + (self.fused > 0)


def condensation(n: int, m: int, centers: int = 4, fuse: bool = True) -> Condensation:
    """Splits n patches by the release's one number: m - 1 are fused, 2 m condensed, the rest stays.

    Args:
        n: patches that arrive; one alone stays.
        m: at most (n + 1) // 3, more is capped.
        centers: coreset centres, at most 2 m.
        fuse: keep a token for the fused ones; False drops them.

    Returns:
        The counts.
    """
    if n < 2:
        return Condensation(n, 0, 0, 0)
    m = max(1, min(m, (n + 1) // 3))
    return Condensation(n + 1 - 3 * m, 2 * m, m - 1 if fuse else 0, min(centers, 2 * m))


def from_ratio(ratio: float, n: int, centers: int = 4) -> int:
    """The number m for a share of patches that a layer keeps (the paper's R): ``ratio * n + 2`` leave it."""
    return int(((1.0 - ratio) * n + centers) / 3.0 + 0.5)


def from_drop_rate(drop_rate: float, n: int) -> int:
    """The number m for the release's drop rate, about a third of 1 - R: ``n + 1 - ceil((1 - drop_rate) n)``."""
    return n + 1 - math.ceil((1.0 - drop_rate) * n)


def schedule(ratio: float, n: int, layers: int = 3, centers: int = 4) -> list[int]:
    """Patches that leave each condensing layer, for a share per layer: 178, 163, 148 of 196 for 0.9.

    Args:
        ratio: the paper's R.
        n: patches that enter the tower.
        layers: condensing layers.
        centers: coreset centres.

    Returns:
        `layers` numbers, CLS not counted; a layer that would not get shorter leaves all.
    """
    left = []
    for _ in range(layers):
        slots = condensation(n, from_ratio(ratio, n, centers), centers).slots
        n = min(n, slots)
        left.append(n)
    return left


def cross_head_rank(attention: Tensor) -> Tensor:
    """Mean over heads of a patch's rank by class-token attention (arXiv 2410.14729): one loud head does not decide.

    Args:
        attention: `[B, H, N]`.

    Returns:
        fp32 `[B, N]` in [0, 1): the lowest rank is 0, the highest (N - 1) / N; the lower index ranks higher in a tie.
    """
    n = attention.shape[2]
    score = torch.where(attention.isnan(), float("-inf"), attention.float())
    place = score.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    return (n - 1 - place).float().mean(1) / n


def coreset(x: Tensor, k: int, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Condenses tokens to k centres: k-center greedy by Euclidean distance, then means weighted by 1 / distance.

    Args:
        x: `[B, N, C]`, any floating dtype.
        k: centres; N where there are fewer tokens.
        first: int64 `[B]`, the first centre.

    Returns:
        The centres in the order chosen, int64 `[B, k]`; the centre that each token joins, int64 `[B, N]`; and its
        weight there, fp32 `[B, N]`, a sum of 1 per centre. A token at no distance, the centre itself included, weighs
        as at distance 1. A centre always keeps itself, also as a copy of an earlier one.
    """
    k = min(k, x.shape[1])
    centers, _ = kernels.greedy_select(x, k, first, rule="max", metric="l2")
    wide = x.float()
    chosen = kernels.take_rows(wide, centers)
    # Differences, not a Gram matrix: only they are exactly 0 for equal tokens.
    distance = torch.stack([(wide - chosen[:, j : j + 1]).norm(dim=-1) for j in range(k)], -1)
    order = torch.arange(k, device=x.device).expand(x.shape[0], k)
    joins = distance.argmin(-1).scatter(1, centers, order)
    near = distance.gather(2, joins.unsqueeze(-1)).squeeze(-1)
    weight = torch.where(near == 0, 1.0, 1.0 / near.clamp(min=1e-30))
    total = torch.zeros_like(weight[:, :k]).scatter_add(1, joins, weight)
    return centers, joins, weight / total.gather(1, joins)


def condense(x: Tensor, score: Tensor, weight: Tensor, plan: Condensation, first: Tensor) -> Reduction:
    """Keeps the best patches, condenses the middle ones to a coreset, and fuses the rest.

    Args:
        x: `[B, N, C]`, patches between attention and MLP.
        score: `[B, N]`, higher stays.
        weight: fp32 `[B, N]`, class-token attention, with which patches are fused (not normalised).
        plan: how many go where.
        first: int64 `[B]`, the coreset's first centre, counted in the middle patches by falling score.

    Returns:
        Slots: kept patches by falling score, centres in the order chosen, the fused token.
    """
    score = torch.where(score.isnan(), float("-inf"), score.float())
    order = score.argsort(dim=1, descending=True, stable=True)
    edge = plan.kept + plan.middle
    kept, middle, low = order[:, : plan.kept], order[:, plan.kept : edge], order[:, edge : edge + plan.fused]
    centers, joins, share = coreset(kernels.take_rows(x, middle), plan.centers, first)
    own = torch.zeros_like(joins, dtype=torch.bool).scatter(1, centers, 1)  # TorchScript has no scatter of a bool
    slot = torch.where(own, -1, joins + plan.kept)
    mass = weight.float().gather(1, low)
    keep = torch.cat([kept, middle.gather(1, centers), low[:, :1]], 1)
    keep_weight = torch.cat([torch.ones_like(kept, dtype=torch.float32), share.gather(1, centers), mass[:, :1]], 1)
    src = torch.cat([middle, low[:, 1:]], 1)
    dst = torch.cat([slot, torch.full_like(low[:, 1:], plan.kept + plan.centers)], 1)
    return Reduction(keep, src, dst, keep_weight, torch.cat([share, mass[:, 1:]], 1))
