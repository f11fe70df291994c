"""Merging rows in gather form: one program an output row, no atomics, the same bits every run."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .table import Tile, tile
from .triton_common import launch, rows_of


@triton.jit
def next_hit(hit, entry, last):
    """The first entry behind `last` that is hit (a large number if there is none)."""
    return tl.min(tl.where(hit & (entry > last), entry, 2147483647), 0)


@triton.jit
def row_or_nan(x, index, n, stride, channel, d):
    """A row in fp32; NaN where the index is outside, which would otherwise read foreign memory."""
    width = tl.where((index >= 0) & (index < n), d, 0)
    return tl.load(x + index * stride + channel, mask=channel < width, other=float("nan")).to(tl.float32)


@triton.jit
def _entry(table, index, n, step):
    """A number of a token, fp32; NaN where the index is outside."""
    return tl.load(table + index * step, mask=(index >= 0) & (index < n), other=float("nan")).to(tl.float32)


@triton.jit
def _put_size(total, bias, out, whole, BIASED: tl.constexpr):
    """Stores a size and, for proportional attention, its logarithm."""
    tl.store(total + out, whole)
    if BIASED:
        tl.store(bias + out, tl.log(whole).to(bias.dtype.element_ty))


@triton.jit
def _owns(keep, src, dst, entry, token, slots, keep_step, src_step, dst_step, BM: tl.constexpr):
    """Whether an entry is the first that names its token, and no slot keeps it."""
    lane = tl.arange(0, BM)
    others = tl.zeros((BM,), tl.int32)
    for at in range(0, slots, BM):
        k = at + lane
        others += (tl.load(keep + k * keep_step, mask=k < slots, other=-1) == token).to(tl.int32)
    for at in range(0, entry, BM):
        e = at + lane
        same = tl.load(src + e * src_step, mask=e < entry, other=-1) == token
        used = tl.load(dst + e * dst_step, mask=e < entry, other=-1) >= 0
        others += (same & used).to(tl.int32)
    return tl.sum(others, 0) == 0


@triton.jit(do_not_specialize=["n", "slots", "entries", "prefix", "suffix"])
def _merge_kernel(
    x, size, keep, src, dst, keep_weight, src_weight, importance, y, total, bias,
    n, slots, entries, d, prefix, suffix,
    x_batch, x_row, size_batch, size_step, keep_batch, keep_step, src_batch, src_step, dst_batch, dst_step,
    kw_batch, kw_step, sw_batch, sw_step, importance_batch, importance_step,
    WEIGHTED: tl.constexpr, PAIRED: tl.constexpr, BIASED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows = prefix + slots + suffix
    # With weights a size follows ownership, not the weights; a program of its own works it out.
    parts = tl.maximum(tl.cdiv(d, BD), 1)
    if WEIGHTED:
        parts = tl.cdiv(d, BD) + 1
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts) % rows
    batch = (tl.program_id(0) // (parts * rows)).to(tl.int64)
    out = batch * rows + row
    x += batch * x_batch
    size += batch * size_batch
    keep += batch * keep_batch
    src += batch * src_batch
    dst += batch * dst_batch
    lane = tl.arange(0, BM)

    slot = row - prefix
    merges = (slot >= 0) & (slot < slots)
    token = tl.load(keep + slot * keep_step, mask=merges, other=0).to(tl.int64) + prefix
    if slot < 0:
        token = row.to(tl.int64)
    if slot >= slots:
        token = (n - rows + row).to(tl.int64)
    looked_at = tl.where(merges, entries, 0)

    if WEIGHTED and part == parts - 1:
        whole = _entry(size, token, n, size_step)
        for at in range(0, looked_at, BM):
            hit = tl.load(dst + (at + lane) * dst_step, mask=at + lane < entries, other=-1) == slot
            last = at - 1
            for _ in range(0, tl.sum(hit.to(tl.int32), 0)):
                last = next_hit(hit, at + lane, last)
                named = tl.load(src + last * src_step).to(tl.int64)
                if _owns(keep, src, dst, last, named, slots, keep_step, src_step, dst_step, BM):
                    whole += _entry(size, named + prefix, n, size_step)
        _put_size(total, bias, out, whole, BIASED)
    else:
        channel = part * BD + tl.arange(0, BD)
        kept = row_or_nan(x, token, n, x_row, channel, d)
        mass = _entry(size, token, n, size_step)
        whole = mass
        change = tl.zeros((BD,), tl.float32)
        if PAIRED:
            importance += batch * importance_batch
            inner = n - prefix - suffix
            mine = _entry(importance, token - prefix, inner, importance_step)
            share = mass  # of the kept row: its size times 1 + sum (w_d - 1)
        for at in range(0, looked_at, BM):
            hit = tl.load(dst + (at + lane) * dst_step, mask=at + lane < entries, other=-1) == slot
            last = at - 1
            for _ in range(0, tl.sum(hit.to(tl.int32), 0)):
                last = next_hit(hit, at + lane, last)
                token = tl.load(src + last * src_step).to(tl.int64) + prefix
                joining = row_or_nan(x, token, n, x_row, channel, d)
                if WEIGHTED:
                    change += tl.load(src_weight + batch * sw_batch + last * sw_step).to(tl.float32) * joining
                else:
                    own = _entry(size, token, n, size_step)
                    whole += own
                    if PAIRED:  # twice the softmax of two
                        theirs = _entry(importance, token - prefix, inner, importance_step)
                        weight = 2.0 / (1.0 + tl.exp(mine - theirs))
                        change += weight * own * joining
                        share += mass * (1.0 - weight)
                    else:
                        change += own * (joining - kept)
        if WEIGHTED:
            weight = tl.load(keep_weight + batch * kw_batch + slot * kw_step, mask=merges, other=1.0).to(tl.float32)
            result = tl.where(merges, weight * kept + change, kept)
        else:
            result = tl.where(whole == mass, kept, kept + change / whole)  # alone: bit for bit
            if PAIRED:
                alone = (whole == mass) & (share == mass)
                result = tl.where(alone, kept, (share * kept + change) / whole)
            if part == 0:
                _put_size(total, bias, out, whole, BIASED)
        tl.store(y + out * d + channel, result.to(y.dtype.element_ty), mask=channel < d)


def both_strides(*tensors: Tensor | None) -> list[int]:
    """Both strides of each `[B, N]` tensor."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride())]


def merge_rows(x: Tensor, size: Tensor, *plan: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.merge_rows` in Triton: rows and sizes in one launch; see `merge`."""
    return merge(x, size, *plan, **settings)


def merge_rows_biased(x: Tensor, size: Tensor, *plan: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`vlmtok.kernels.merge_rows_biased` in Triton: rows, sizes and their logarithms in one launch."""
    bias = x.new_empty(x.shape[0], _rows(plan[0], **settings))
    return *merge(x, size, *plan, **settings, bias=bias), bias


def _rows(keep: Tensor, prefix: int = 0, suffix: int = 0, **_: Any) -> int:
    """Rows of a merged row."""
    return prefix + keep.shape[1] + suffix


def merge(
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
    bias: Tensor | None = None,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch of the kernel.

    Args:
        x: `[B, prefix + N + suffix, C]`.
        size: fp32 `[B, prefix + N + suffix]`.
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`.
        keep_weight: `[B, K]`, or None.
        src_weight: `[B, R]`, or None.
        importance: `[B, N]`, or None: weights of pairs are worked out from it.
        prefix: rows in front that stay.
        suffix: rows behind that stay.
        bias: `[B, prefix + K + suffix]`, contiguous, or None: gets log(size).
        config: a row of the tile table; None takes the one that fits.

    Returns:
        The rows and their sizes.
    """
    x = rows_of(x)
    batch, n, d = x.shape
    slots, entries = keep.shape[1], src.shape[1]
    rows = prefix + slots + suffix
    y = x.new_empty(batch, rows, d)
    total = size.new_empty(batch, rows)
    config = config or tile("merge_rows", x.element_size(), d)
    parts = max(1, triton.cdiv(d, config.n)) if keep_weight is None else triton.cdiv(d, config.n) + 1
    launch(
        _merge_kernel, batch * rows * parts, x,
        x, size, keep, src, dst, keep_weight, src_weight, importance, y, total, bias,
        n, slots, entries, d, prefix, suffix,
        x.stride(0), x.stride(1), *both_strides(size, keep, src, dst, keep_weight, src_weight, importance),
        warps=config.warps, WEIGHTED=keep_weight is not None, PAIRED=importance is not None, BIASED=bias is not None,
        BM=config.m, BD=config.n,
    )  # fmt: skip
    return y, total
