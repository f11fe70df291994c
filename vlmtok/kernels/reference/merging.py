"""Merging rows: sums of what is kept and what joins it, the weights of pairs, the gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import log_size
from .rows import accumulator, add_rows, flat_index, take_rows


def merge_rows(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    keep_weight: Tensor | None = None,
    src_weight: Tensor | None = None,
    importance: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.merge_rows`."""
    if importance is not None:
        inner = size[:, prefix : size.shape[1] - suffix]
        keep_weight, src_weight = pair_weights(keep, src, dst, importance, inner)
    kept = _widen(keep, prefix, suffix, x.shape[1])
    kept_size = size.gather(1, kept)
    rows = take_rows(x, kept)
    if keep.shape[1] == 0 or (src.shape[1] == 0 and keep_weight is None):
        return rows, kept_size  # nothing joins; without slots, every entry is empty
    empty = dst < 0
    # An empty entry reads and writes slot 0 with weight 0, so that a NaN it names goes nowhere.
    slot = dst.clamp(min=0)
    token = torch.where(empty, keep[:, :1], src) if src.shape[1] else src
    if prefix:
        slot, token = slot + prefix, token + prefix
    at = flat_index(slot, kept.shape[1])
    joining = take_rows(x, token).flatten(0, 1)
    if keep_weight is None or src_weight is None:
        mass = torch.where(empty, 0.0, size.gather(1, token))
        total = kept_size.scatter_add(1, slot, mass)
        share = mass / total.gather(1, slot).clamp_min(torch.finfo(torch.float32).tiny)
        # x_k + sum share (x_s - x_k): touches only what is joined, and equal rows merge to exactly themselves.
        out = accumulator(rows).flatten(0, 1)
        change = (joining - out.index_select(0, at)) * share.reshape(-1, 1)
        change.masked_fill_(empty.reshape(-1, 1), 0.0)
    else:
        owned = _owned(src, dst, keep, x.shape[1])
        total = kept_size.scatter_add(1, slot, torch.where(owned, size.gather(1, token), 0.0))
        kept_weight = F.pad(keep_weight, (prefix, suffix), value=1.0) if prefix or suffix else keep_weight
        weight = torch.where(empty, 0.0, src_weight)
        out = (accumulator(rows) * kept_weight.unsqueeze(-1)).flatten(0, 1)
        change = (accumulator(joining) * weight.reshape(-1, 1)).masked_fill_(empty.reshape(-1, 1), 0.0)
    return add_rows(out, at, change.to(out.dtype)).to(x.dtype).reshape(rows.shape), total


def merge_rows_biased(x: Tensor, size: Tensor, *plan: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of `vlmtok.kernels.merge_rows_biased`."""
    rows, total = merge_rows(x, size, *plan, **settings)
    return rows, total, log_size(total, x.dtype)


def pair_weights(keep: Tensor, src: Tensor, dst: Tensor, importance: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a merge in which the more important of two weighs more (CrossGET, arXiv 2305.17455, section 3.2).

    A source s and its slot's own token d share ``w_s + w_d = 2``, the softmax of their importance times 2. Slot d
    becomes ``(s_d x_d + sum [w_s s_s x_s + (w_d - 1) s_d x_d]) / (s_d + sum s_s)`` with sizes s. Equal importance gives
    the size-weighted mean; several sources of one slot, or unequal sizes, give weights that do not sum to one, as
    released.

    Args:
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`, every token at most once.
        dst: int64 `[B, R]`, the slot that each joins, -1 for an empty entry.
        importance: fp32 `[B, N]`; gradients flow.
        size: fp32 `[B, N]`.

    Returns:
        Weights of the kept rows `[B, K]` and of the joining ones `[B, R]`, fp32, as `merge_rows` takes them.
    """
    empty, slot, src = dst < 0, dst.clamp(min=0), src.clamp(min=0)
    pair = torch.stack([importance.gather(1, src), importance.gather(1, keep).gather(1, slot)], -1)
    weight = 2.0 * accumulator(pair).softmax(-1)
    kept, joined = size.gather(1, keep), size.gather(1, src).masked_fill(empty, 0.0)
    total = kept.scatter_add(1, slot, joined)
    divisor = total.clamp_min(torch.finfo(torch.float32).tiny)
    own = torch.ones_like(kept, dtype=weight.dtype).flatten()
    more = torch.where(empty, 0.0, weight[..., 1] - 1.0).flatten()
    own = add_rows(own, flat_index(slot, keep.shape[1]), more).view(keep.shape)
    share = torch.where(empty, 0.0, weight[..., 0] * joined / divisor.gather(1, slot))
    return torch.where(kept == total, own, kept * own / divisor), share


def merge_rows_grad(
    grad: Tensor, keep: Tensor, src: Tensor, dst: Tensor, keep_weight: Tensor, src_weight: Tensor, n: int,
    prefix: int = 0, suffix: int = 0,
) -> Tensor:  # fmt: skip
    """Gradient of `merge_rows` with respect to x: the transposed map.

    Args:
        grad: `[B, prefix + K + suffix, C]`, of the rows.
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`, -1 for an empty entry.
        keep_weight: fp32 `[B, K]`.
        src_weight: fp32 `[B, R]`.
        n: rows of x.
        prefix: as in `merge_rows`.
        suffix: as in `merge_rows`.

    Returns:
        `[B, n, C]` in the dtype of `grad`.
    """
    batch, width = grad.shape[0], grad.shape[2]
    kept = _widen(keep, prefix, suffix, n)
    kept_weight = F.pad(keep_weight, (prefix, suffix), value=1.0) if prefix or suffix else keep_weight
    empty = dst < 0
    weight = torch.where(empty, 0.0, src_weight)
    wide = accumulator(grad)
    out = wide.new_zeros(batch * n, width)
    add_rows(out, flat_index(kept, n), (wide * kept_weight.unsqueeze(-1)).flatten(0, 1).to(out.dtype))
    joined = take_rows(wide, dst.clamp(min=0) + prefix) * weight.unsqueeze(-1)
    joined = torch.where(empty.unsqueeze(-1), 0.0, joined)
    add_rows(out, flat_index(src.clamp(min=0) + prefix, n), joined.flatten(0, 1).to(out.dtype))
    return out.reshape(batch, n, width).to(grad.dtype)


def _widen(keep: Tensor, prefix: int, suffix: int, n: int) -> Tensor:
    """`keep` on the whole row, with the rows around it that stay."""
    if not prefix and not suffix:
        return keep
    batch = keep.shape[0]
    head = torch.arange(prefix, device=keep.device).expand(batch, prefix)
    tail = torch.arange(n - suffix, n, device=keep.device).expand(batch, suffix)
    return torch.cat([head, keep + prefix, tail], 1)


def _owned(src: Tensor, dst: Tensor, keep: Tensor, n: int) -> Tensor:
    """Which entries own their token: not empty, the first to name it, and the token is not kept. bool `[B, R]`."""
    batch, entries = src.shape
    token = torch.where(dst < 0, n, src)
    entry = torch.arange(entries, device=src.device).expand_as(src)
    first = src.new_full((batch, n + 1), entries).scatter_reduce(1, token, entry, "amin")
    first = first.scatter(1, keep, src.new_full(keep.shape, entries))
    return (first.gather(1, token) == entry) & (dst >= 0)
