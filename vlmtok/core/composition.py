"""Two reductions, one after the other, as one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ParameterError
from .merging import apply, assignment
from .reduction_data import Fields, ReductionData


def compose(first: ReductionData, second: ReductionData, size: Tensor | None) -> Fields:
    """The fields of one plan that does what two in a row do."""
    if first.valid is not None or second.valid is not None:
        raise ParameterError("Reduction.then takes no ragged reductions (valid)")
    weighted = first.keep_weight is not None or second.keep_weight is not None
    a, b = first, second
    if weighted:
        a, b = with_weights(first, size), with_weights(second, _sizes(first, size))
    keep = a.keep.gather(1, b.keep)
    slot, scale = _where(b, a.slots)
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    if a.src is not None and a.dst is not None:
        empty = a.dst < 0
        at = a.dst.clamp(min=0)
        to = torch.where(empty, -1, slot.gather(1, at))
        weight = None if a.src_weight is None or scale is None else a.src_weight * scale.gather(1, at)
        parts.append((a.src, to, weight))
    if b.src is not None and b.dst is not None:
        from_a = a.keep.gather(1, b.src.clamp(min=0))
        weight = None
        if b.src_weight is not None and a.keep_weight is not None:
            weight = b.src_weight * a.keep_weight.gather(1, b.src.clamp(min=0))
        parts.append((from_a, b.dst, weight))
    keep_weight = None
    if a.keep_weight is not None and b.keep_weight is not None:
        keep_weight = a.keep_weight.gather(1, b.keep) * b.keep_weight
    if not parts:
        return keep, None, None, None, None, None
    src, dst = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
    src_weight = torch.cat([p[2] for p in parts if p[2] is not None], 1) if weighted else None
    return keep, src, dst, keep_weight, src_weight, None


def _sizes(plan: ReductionData, size: Tensor | None) -> Tensor:
    """Sizes of the slots, fp32 `[B, K]`."""
    if size is None:
        kept = torch.ones_like(plan.keep, dtype=torch.float32)
        if plan.src is None or plan.dst is None:
            return kept
        slot = torch.where(plan.dst < 0, plan.slots, plan.dst)
        table = torch.cat([kept, kept.new_zeros(kept.shape[0], 1)], 1)
        return table.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32))[:, :-1]
    return apply(plan, size.unsqueeze(-1).expand(-1, size.shape[1], 1), size, None, 0, 0)[1]


def with_weights(plan: ReductionData, size: Tensor | None) -> ReductionData:
    """The same reduction with its weights written out."""
    if plan.keep_weight is not None:
        return plan
    if plan.src is None or plan.dst is None:
        none = plan.keep.new_zeros(plan.keep.shape[0], 0)
        ones = torch.ones_like(plan.keep, dtype=torch.float32)
        return ReductionData(plan.keep, none, none, ones, none.to(torch.float32), plan.valid)
    total = _sizes(plan, size)
    one = torch.ones_like
    kept = one(plan.keep, dtype=torch.float32) if size is None else size.gather(1, plan.keep)
    joined = one(plan.src, dtype=torch.float32) if size is None else size.gather(1, plan.src.clamp(min=0))
    share = joined / total.gather(1, plan.dst.clamp(min=0))
    return ReductionData(plan.keep, plan.src, plan.dst, kept / total, torch.where(plan.dst < 0, 0.0, share), plan.valid)


def _where(plan: ReductionData, n: int) -> tuple[Tensor, Tensor | None]:
    """Slot of every one of n tokens (-1 dropped), and the weight it has there (None without weights)."""
    slot = assignment(plan, n)
    if plan.keep_weight is None or plan.src_weight is None or plan.src is None or plan.dst is None:
        return slot, None
    weight = plan.keep_weight.new_zeros(slot.shape[0], n + 1)
    weight = weight.scatter(1, torch.where(plan.dst < 0, n, plan.src), plan.src_weight)
    return slot, weight.scatter(1, plan.keep, plan.keep_weight)[:, :n]
