"""Sums of attention by key-value head and key, over sets of query rows, without the matrix of attention."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .table import Tile, tile
from .triton_common import (
    LOG2E,
    add_exponentials,
    dot_rows,
    launch,
    load_rows,
    log_of_sum,
    product,
    rows_of,
    same_dtype,
)

_CAUSAL, _BIAS, _SEEN = 0, 1, 2
"""What says where rows look: their places, a floating mask, a bool mask."""


@triton.jit
def _logits(
    left, right, scale, cap,
    CAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Logits of the rows of two tiles, times log2(e)."""
    dots = dot_rows(left, right, tl.zeros((BM, BN), tl.float32), UPCAST, PRECISION) * scale
    if CAP:  # cap tanh(x), where the scale makes of the products 2 x log2(e)
        dots = cap - 2.0 * cap / (tl.exp2(dots) + 1.0)
    return dots


@triton.jit
def _told(mask, row, column, rows, columns, mask_row, mask_column, other):
    """A tile of the layer's mask, of rows and columns in tiles of two axes; `other` where it has none."""
    there = (row >= 0) & (row < rows) & (column < columns)
    at = mask + row.to(tl.int64) * mask_row + column.to(tl.int64) * mask_column
    return tl.load(at, mask=there, other=other)


@triton.jit
def _added(mask, row, column, rows, columns, mask_row, mask_column):
    """A tile of what a floating mask adds to logits, times log2(e)."""
    told = _told(mask, row, column, rows, columns, mask_row, mask_column, float("nan"))
    return told.to(tl.float32) * 1.4426950408889634


@triton.jit(do_not_specialize=["m", "n", "rows"])
def _rows_kernel(
    q, k, at, valid, mask, out, heads, shared, m, n, d, rows, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, at_batch, at_row, mask_batch, mask_head, mask_row, mask_column,
    CAP: tl.constexpr, MASK: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of the exponentials of every query row."""
    tiles = tl.cdiv(m, BM)
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)  # head x stride can exceed 32 bits
    batch = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    feature = tl.arange(0, BK)
    k += batch * k_batch + (head // shared) * k_head
    place = tl.load(at + batch * at_batch + i * at_row, mask=i < m, other=-1).to(tl.int32)
    end = n
    if MASK == 0:
        end = tl.minimum(n, tl.max(place, 0) + 1)
    else:
        mask += batch * mask_batch + head * mask_head
    tile_q = load_rows(q + batch * q_batch + head * q_head, i, i < m, q_row, feature, d)
    most = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        tile_k = load_rows(k, j, j < n, k_row, feature, d)
        logits = _logits(tile_q, tile_k, scale, cap, CAP, UPCAST, PRECISION, BM, BN)
        look = (j < n)[None, :]
        if MASK == 0:
            look = look & (j[None, :] <= place[:, None])
        row = (place - (n - rows))[:, None]
        if MASK == 1:
            logits += _added(mask, row, j[None, :], rows, n, mask_row, mask_column)
        if MASK == 2:
            look = look & (_told(mask, row, j[None, :], rows, n, mask_row, mask_column, 0) != 0)
        if VALID:
            look = look & (tl.load(valid + batch * n + j, mask=j < n, other=0) != 0)[None, :]
        most, total = add_exponentials(most, total, tl.where(look, logits, float("-inf")))
    tl.store(out + (batch * heads + head) * m + i, log_of_sum(most, total), mask=i < m)


@triton.jit
def _of_set(members, number: tl.constexpr, i, m, part, CHOSEN: tl.constexpr):
    """Sum over the query rows of a set."""
    if CHOSEN:
        chosen = tl.load(members + number * m + i, mask=i < m, other=0) != 0
        part = tl.where(chosen[None, :], part, 0.0)
    return tl.sum(part, 1)


@triton.jit(do_not_specialize=["m", "n", "rows"])
def _columns_kernel(
    q, k, at, valid, mask, members, normaliser, out, heads, shared, m, n, d, rows, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, at_batch, at_row, mask_batch, mask_head, mask_row, mask_column,
    SETS: tl.constexpr, CHOSEN: tl.constexpr,
    CAP: tl.constexpr, MASK: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Attention that each key gets from one head, summed over the rows of up to four sets."""
    tiles = tl.cdiv(n, BM)
    origin = (tl.program_id(0) % tiles) * BM
    j = origin + tl.arange(0, BM)
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)  # head x stride can exceed 32 bits
    batch = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    feature = tl.arange(0, BK)
    q += batch * q_batch + head * q_head
    at += batch * at_batch
    if CHOSEN:
        members += batch * SETS * m
    normaliser += (batch * heads + head) * m
    begin = 0
    if MASK == 0:  # rows in front of the first that sees one of these keys give nothing
        begin = m
        for start in range(0, m, 1024):
            i = start + tl.arange(0, 1024)
            place = tl.load(at + i * at_row, mask=i < m, other=-1)
            begin = tl.minimum(begin, tl.min(tl.where(place >= origin, i, m), 0))
        begin = begin // BN * BN
    else:
        mask += batch * mask_batch + head * mask_head
    tile_k = load_rows(k + batch * k_batch + (head // shared) * k_head, j, j < n, k_row, feature, d)
    a = tl.zeros((BM,), tl.float32)
    b = tl.zeros((BM,), tl.float32)
    c = tl.zeros((BM,), tl.float32)
    e = tl.zeros((BM,), tl.float32)
    for start in range(begin, m, BN):
        i = start + tl.arange(0, BN)
        tile_q = load_rows(q, i, i < m, q_row, feature, d)
        logits = _logits(tile_k, tile_q, scale, cap, CAP, UPCAST, PRECISION, BM, BN)
        place = tl.load(at + i * at_row, mask=i < m, other=-1).to(tl.int32)
        look = (i < m)[None, :]
        if MASK == 0:
            look = look & (j[:, None] <= place[None, :])
        row = (place - (n - rows))[None, :]
        if MASK == 1:
            logits += _added(mask, row, j[:, None], rows, n, mask_row, mask_column)
        if MASK == 2:
            look = look & (_told(mask, row, j[:, None], rows, n, mask_row, mask_column, 0) != 0)
        base = tl.load(normaliser + i, mask=i < m, other=0.0)
        # Chosen, not multiplied: what is NaN reaches nothing but what looks at it.
        part = tl.where(look, tl.exp2(logits - base[None, :]), 0.0)
        a += _of_set(members, 0, i, m, part, CHOSEN)
        if SETS > 1:
            b += _of_set(members, 1, i, m, part, CHOSEN)
        if SETS > 2:
            c += _of_set(members, 2, i, m, part, CHOSEN)
        if SETS > 3:
            e += _of_set(members, 3, i, m, part, CHOSEN)
    real = j < n
    if VALID:
        real = tl.load(valid + batch * n + j, mask=j < n, other=0) != 0
    out += (batch * SETS * heads + head) * n
    tl.store(out + j, tl.where(real, a, 0.0), mask=j < n)
    if SETS > 1:
        tl.store(out + heads * n + j, tl.where(real, b, 0.0), mask=j < n)
    if SETS > 2:
        tl.store(out + 2 * heads * n + j, tl.where(real, c, 0.0), mask=j < n)
    if SETS > 3:
        tl.store(out + 3 * heads * n + j, tl.where(real, e, 0.0), mask=j < n)


@triton.jit(do_not_specialize=["n"])
def _shared_kernel(sums, out, shared, n, BN: tl.constexpr):
    """Means over the heads that share keys, side by side, added in their order."""
    tiles = tl.cdiv(n, BN)
    j = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for head in range(0, shared):
        total += tl.load(sums + (group * shared + head) * n + j, mask=j < n, other=0.0)
    tl.store(out + group * n + j, total / shared, mask=j < n)


def causal_column_sums(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    at: Tensor | None = None,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    cap: float | None = None,
    sets: Sequence[Tensor | None] = (None,),
    config: Tile | None = None,
) -> Tensor:
    """`vlmtok.kernels.causal_column_sums` in Triton: normalisers, sums of each head, means over heads that share keys.

    Args:
        q: `[B, H, R, d]`.
        k: `[B, Hkv, S, d]`.
        scale: factor of the logits.
        at: int64 `[B, R]`, or None.
        valid: bool `[B, S]`, or None.
        mask: bool or floating `[B or 1, 1 or H, L, S]`, or None.
        cap: soft cap of the logits, or None.
        sets: at most four, bool `[B, n]` or None.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        fp32 `[B, sets, Hkv, S]`.
    """
    q, k = same_dtype(rows_of(q), rows_of(k))
    batch, heads, m, d = q.shape
    groups, n = k.shape[1], k.shape[2]
    if batch * heads * m * n == 0:
        return q.new_zeros(batch, len(sets), groups, n, dtype=torch.float32)
    if at is None:
        at = torch.arange(n - m, n, device=q.device).expand(batch, m)
    config = config or tile("causal_column_sums", q.element_size(), d)
    spread = None if mask is None else mask.expand(batch, heads, -1, -1)
    kind = _CAUSAL if mask is None else _SEEN if mask.dtype == torch.bool else _BIAS
    unit = float(scale) * LOG2E if cap is None else float(scale) * 2.0 * LOG2E / cap
    normaliser = q.new_empty(batch, heads, m, dtype=torch.float32)
    sums = q.new_empty(batch, len(sets), heads, n, dtype=torch.float32)
    rows = 0 if mask is None else mask.shape[2]
    shape = (heads, heads // groups, m, n, d, rows, unit, 0.0 if cap is None else cap * LOG2E)
    steps = (*q.stride()[:3], *k.stride()[:3], *at.stride(), *((0, 0, 0, 0) if spread is None else spread.stride()))
    settings = {"warps": config.warps, "stages": config.stages, "CAP": cap is not None, "MASK": kind}
    settings |= {"VALID": valid is not None, **product(q.dtype), "BM": config.m, "BN": config.n, "BK": config.k}
    looks = (q, k, at, None if valid is None else valid.contiguous(), spread)
    launch(_rows_kernel, batch * heads * triton.cdiv(m, config.m), q, *looks, normaliser, *shape, *steps, **settings)
    members = _together(sets, q, m)
    launch(
        _columns_kernel, batch * heads * triton.cdiv(n, config.m), q, *looks, members, normaliser, sums, *shape, *steps,
        SETS=len(sets), CHOSEN=members is not None, **settings,
    )  # fmt: skip
    if heads == groups:
        return sums
    out = q.new_empty(batch, len(sets), groups, n, dtype=torch.float32)
    launch(
        _shared_kernel, batch * len(sets) * groups * triton.cdiv(n, 1024), q, sums, out, heads // groups, n,
        warps=4, BN=1024,
    )  # fmt: skip
    return out


def _together(sets: Sequence[Tensor | None], q: Tensor, m: int) -> Tensor | None:
    """The sets as one table, bool `[B, sets, R]`, or None where the only one is all rows."""
    if all(members is None for members in sets) and len(sets) == 1:
        return None
    whole = q.new_ones(q.shape[0], m, dtype=torch.bool)
    return torch.stack([whole if own is None else F.pad(own, (m - own.shape[1], 0)) for own in sets], 1)
