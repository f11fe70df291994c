"""Reductions of stretches of one row, each decided by itself, as one reduction of that row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .composition import with_weights
from .reduction import Reduction
from .reduction_data import ReductionData


@dataclass(frozen=True, eq=False)
class Stretches:
    """Stretches of equal length.

    Attributes:
        columns: int64 `[b, n]`, where their tokens stand in the row.
        first: int64 `[b]`, where the first slot of each will stand.
        reduction: of them, or None where all tokens stay.
    """

    columns: Tensor
    first: Tensor
    reduction: Reduction | None


def joined(pieces: Sequence[Stretches], slots: int, size: Tensor | None) -> Reduction:
    """The reduction of a whole row.

    Args:
        pieces: disjoint stretches that together are the row.
        slots: of the row when all is done.
        size: fp32 `[1, N]`, sizes of the row's tokens, or None for ones; needed where some pieces give weights and
            others merge without.

    Returns:
        A reduction of `[1, N]`; the slots of a stretch stand where it stood, in its own order.
    """
    device = pieces[0].columns.device
    plans = [_plan(piece) for piece in pieces]
    if any(plan.keep_weight is not None for plan in plans):
        plans = [
            with_weights(plan, None if size is None else size[0, piece.columns]) for plan, piece in zip(plans, pieces)
        ]
    keep = torch.empty(1, slots, dtype=torch.int64, device=device)
    keep_weight = torch.ones(1, slots, device=device) if any(p.keep_weight is not None for p in plans) else None
    joining: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for plan, piece in zip(plans, pieces):
        place = piece.first[:, None] + torch.arange(plan.slots, device=device)
        keep[0, place] = piece.columns.gather(1, plan.keep)
        if keep_weight is not None and plan.keep_weight is not None:
            keep_weight[0, place] = plan.keep_weight.float()
        if plan.src is None or plan.dst is None or not plan.src.shape[1]:
            continue
        source = piece.columns.gather(1, plan.src.clamp(min=0))
        target = torch.where(plan.dst < 0, -1, piece.first[:, None] + plan.dst)
        joining.append((source, target, plan.src_weight))
    if not joining and keep_weight is None:
        return Reduction(keep)
    empty = [torch.empty(0, dtype=torch.int64, device=device)]
    src = torch.cat([source.flatten() for source, _, _ in joining] or empty)[None]
    dst = torch.cat([target.flatten() for _, target, _ in joining] or empty)[None]
    src_weight = None
    if keep_weight is not None:
        weights = [weight.float().flatten() for _, _, weight in joining if weight is not None]
        src_weight = torch.cat([torch.empty(0, device=device), *weights])[None]
    return Reduction(keep, src, dst, keep_weight, src_weight)


def _plan(piece: Stretches) -> ReductionData:
    """Its reduction, or the one that keeps everything."""
    if piece.reduction is not None:
        return piece.reduction
    return ReductionData(torch.arange(piece.columns.shape[1], device=piece.columns.device).expand_as(piece.columns))
