"""Gradient of a merge in gather form: one program a row of x, no atomics, the same bits every run."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .table import Tile, tile
from .triton_common import launch, rows_of
from .triton_merge import both_strides, next_hit, row_or_nan


@triton.jit(do_not_specialize=["n", "slots", "entries", "prefix", "suffix"])
def _merge_grad_kernel(
    grad, keep, src, dst, keep_weight, src_weight, out,
    n, slots, entries, d, prefix, suffix,
    grad_batch, grad_row, keep_batch, keep_step, src_batch, src_step, dst_batch, dst_step,
    kw_batch, kw_step, sw_batch, sw_step,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(d, BD)
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts) % n
    batch = (tl.program_id(0) // (parts * n)).to(tl.int64)
    grad += batch * grad_batch
    keep += batch * keep_batch
    src += batch * src_batch
    dst += batch * dst_batch
    channel = part * BD + tl.arange(0, BD)
    rows = prefix + slots + suffix
    token = row - prefix
    inner = (token >= 0) & (row < n - suffix)
    result = tl.zeros((BD,), tl.float32)
    if token < 0:
        result += row_or_nan(grad, row.to(tl.int64), rows, grad_row, channel, d)
    if row >= n - suffix:
        result += row_or_nan(grad, (rows - n + row).to(tl.int64), rows, grad_row, channel, d)
    lane = tl.arange(0, BM)
    for at in range(0, tl.where(inner, slots, 0), BM):
        slot = at + lane
        hit = tl.load(keep + slot * keep_step, mask=slot < slots, other=-1) == token
        last = at - 1
        for _ in range(0, tl.sum(hit.to(tl.int32), 0)):
            last = next_hit(hit, slot, last)
            weight = tl.load(keep_weight + batch * kw_batch + last * kw_step).to(tl.float32)
            result += weight * row_or_nan(grad, (prefix + last).to(tl.int64), rows, grad_row, channel, d)
    for at in range(0, tl.where(inner, entries, 0), BM):
        entry = at + lane
        goal = tl.load(dst + entry * dst_step, mask=entry < entries, other=-1)
        hit = (tl.load(src + entry * src_step, mask=entry < entries, other=-1) == token) & (goal >= 0)
        last = at - 1
        for _ in range(0, tl.sum(hit.to(tl.int32), 0)):
            last = next_hit(hit, entry, last)
            weight = tl.load(src_weight + batch * sw_batch + last * sw_step).to(tl.float32)
            slot_row = tl.load(dst + last * dst_step).to(tl.int64) + prefix
            result += weight * row_or_nan(grad, slot_row, rows, grad_row, channel, d)
    tl.store(out + (batch * n + row) * d + channel, result.to(out.dtype.element_ty), mask=channel < d)


def merge_rows_grad(
    grad: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    keep_weight: Tensor,
    src_weight: Tensor,
    n: int,
    prefix: int = 0,
    suffix: int = 0,
    *,
    config: Tile | None = None,
) -> Tensor:
    """Gradient of `merge_rows` with respect to x in Triton; see `vlmtok.kernels.reference.merge_rows_grad`.

    Args:
        grad: `[B, prefix + K + suffix, C]`.
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`.
        keep_weight: `[B, K]`.
        src_weight: `[B, R]`.
        n: rows of x.
        prefix: rows in front that stay.
        suffix: rows behind that stay.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        `[B, n, C]` in the dtype of `grad`.
    """
    grad = rows_of(grad)
    batch, _, d = grad.shape
    out = grad.new_empty(batch, n, d)
    config = config or tile("merge_rows", grad.element_size(), d)
    launch(
        _merge_grad_kernel, batch * n * triton.cdiv(d, config.n), grad,
        grad, keep, src, dst, keep_weight, src_weight, out, n, keep.shape[1], src.shape[1], d, prefix, suffix,
        grad.stride(0), grad.stride(1), *both_strides(keep, src, dst, keep_weight, src_weight),
        warps=config.warps, BM=config.m, BD=config.n,
    )  # fmt: skip
    return out
