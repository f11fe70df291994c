"""What a reduction does to tokens: slots and their sizes, which slot owns a token, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..errors import ParameterError
from .reduction_data import Fields, ReductionData


def apply(
    plan: ReductionData, tokens: Tensor, size: Tensor | None, protected: Tensor | None, prefix: int, suffix: int
) -> tuple[Tensor, Tensor]:
    """Rows as short as a plan says: each kept token, or the size-weighted mean of it and what joined it."""
    if tokens.dim() != 3 or tokens.shape[0] != plan.keep.shape[0]:
        raise ParameterError(f"tokens must be [B = {plan.keep.shape[0]}, N, C], got {list(tokens.shape)}")
    if protected is not None and (prefix or suffix):
        raise ParameterError("Reduction.apply takes protected tokens, or a prefix and suffix in the row, not both")
    if size is None:
        size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
    weights = plan.merge_weights()
    if protected is not None and protected.shape[1]:
        weights = {"keep_weight": plan.keep_weight, "src_weight": plan.src_weight}  # those of the view's tokens
        tokens = torch.cat([tokens, protected.to(tokens.dtype)], 1)
        size = torch.cat([size, size.new_zeros(size.shape[0], protected.shape[1])], 1)
    if (prefix or suffix) and (plan.src is None or plan.valid is not None):
        whole = ReductionData(*widen(plan, prefix, tokens.shape[1] - prefix - suffix, suffix))
        return apply(whole, tokens, size, None, 0, 0)
    if plan.src is None or plan.dst is None:
        index = plan.keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return tokens.gather(1, index), size.gather(1, plan.keep)
    merged, sizes = kernels.merge_rows(
        tokens, size, plan.keep, plan.src, plan.dst, prefix=prefix, suffix=suffix, **weights
    )
    if plan.valid is not None:  # a token of an invalid slot may belong to another one
        owner = assignment(plan, tokens.shape[1])
        table = size.new_zeros(size.shape[0], plan.slots + 1)
        sizes = table.scatter_add(1, torch.where(owner < 0, plan.slots, owner), size)[:, :-1]
    return merged, sizes


def apply_biased(
    plan: ReductionData, tokens: Tensor, size: Tensor | None, prefix: int, suffix: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Reduction.apply_biased`."""
    if not plan.merges or plan.src is None or plan.dst is None or plan.valid is not None:
        return *apply(plan, tokens, size, None, prefix, suffix), None
    if size is None:
        size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
    return kernels.merge_rows_biased(
        tokens, size, plan.keep, plan.src, plan.dst, prefix=prefix, suffix=suffix, **plan.merge_weights()
    )


def widen(plan: ReductionData, prefix: int, n: int, suffix: int) -> Fields:
    """The fields of the plan for rows that have `prefix` tokens in front and `suffix` behind, all of which stay."""
    batch, device = plan.keep.shape[0], plan.keep.device
    head = torch.arange(prefix, device=device).expand(batch, prefix)
    tail = torch.arange(prefix + n, prefix + n + suffix, device=device).expand(batch, suffix)
    keep = torch.cat([head, plan.keep + prefix, tail], 1)
    src = None if plan.src is None else plan.src + prefix
    dst = None if plan.dst is None else torch.where(plan.dst < 0, plan.dst, plan.dst + prefix)
    keep_weight = plan.keep_weight
    if keep_weight is not None:
        one = keep_weight.new_ones
        keep_weight = torch.cat([one(batch, prefix), keep_weight, one(batch, suffix)], 1)
    valid = plan.valid
    if valid is not None:
        valid = torch.cat([valid.new_ones(batch, prefix), valid, valid.new_ones(batch, suffix)], 1)
    return keep, src, dst, keep_weight, plan.src_weight, valid


def assignment(plan: ReductionData, n: int) -> Tensor:
    """The slot that each of `n` tokens went to, int64 `[B, n]`; -1 where it left."""
    batch, slots = plan.keep.shape
    owner = plan.keep.new_full((batch, n + 1), -1)  # column n takes what empty entries write
    if plan.src is not None and plan.dst is not None and plan.src.shape[1]:
        token = torch.where(plan.dst < 0, n, plan.src)
        entry = torch.arange(plan.src.shape[1], device=plan.src.device).expand_as(plan.src)
        none = plan.src.shape[1]
        first = owner.new_full((batch, n + 1), none).scatter_reduce(1, token, entry, "amin")
        owner = torch.where(first < none, plan.dst.gather(1, first.clamp(max=none - 1)), owner)
    slot = torch.arange(slots, device=plan.keep.device).expand(batch, slots)
    token = plan.keep if plan.valid is None else torch.where(plan.valid, plan.keep, n)
    return owner.scatter(1, token, slot)[:, :n]


def unmerge(plan: ReductionData, tokens: Tensor, n: int) -> Tensor:
    """Rows of the old length: every token gets the features of its slot, and zeros where it left."""
    owner = assignment(plan, n)
    if tokens.shape[1] == 0:
        return tokens.new_zeros(tokens.shape[0], n, tokens.shape[2])
    index = owner.clamp(min=0).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return torch.where((owner >= 0).unsqueeze(-1), tokens.gather(1, index), 0.0)


def gather(plan: ReductionData, table: Tensor, dim: int) -> Tensor:
    """What belongs to the kept tokens, without merging."""
    shape = [1] * table.dim()
    shape[0], shape[dim] = plan.keep.shape
    target = list(table.shape)
    target[dim] = plan.keep.shape[1]
    return table.gather(dim, plan.keep.reshape(shape).expand(target))
