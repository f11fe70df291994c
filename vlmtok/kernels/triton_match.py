"""Cosine row maximum and its column, without the matrix of similarities."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference.rows import EPS
from .table import Tile, tile
from .triton_common import (
    dot_rows,
    launch,
    load_rows,
    product,
    row_scale,
    rows_of,
    same_dtype,
    scales_first,
    step,
    tile_scale,
)


@triton.jit(do_not_specialize=["m", "n", "offset"])
def _match_kernel(
    a, b, scale_a, scale_b, pick_a, pick_b, rank_a, rank_b, valid_b, value, index,
    m, n, d, offset,
    a_batch, a_row, b_batch, b_row, scale_a_batch, scale_b_batch, scale_step, pick_a_batch, pick_b_batch, valid_batch,
    SCALED: tl.constexpr, PICKED: tl.constexpr, DIAG: tl.constexpr, RANKED: tl.constexpr, VALID: tl.constexpr,
    VALUES: tl.constexpr, EPS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, ONE_STEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(m, BM)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    lane = tl.arange(0, BN)
    feature = tl.arange(0, BK)
    a += batch * a_batch
    b += batch * b_batch
    there_a = i < m
    row_a = i
    if PICKED:
        row_a = tl.load(pick_a + batch * pick_a_batch + i, mask=there_a, other=0)
    if SCALED:
        left = tl.load(scale_a + batch * scale_a_batch + row_a * scale_step, mask=there_a, other=0.0)
    if ONE_STEP:
        tile_a = load_rows(a, row_a, there_a, a_row, feature, d)
        if not SCALED:
            left = tile_scale(tile_a, EPS)
    if RANKED:
        mine = tl.load(rank_a + batch * m + i, mask=there_a, other=0)

    # The best of each lane and the tile it came from; lanes are compared once, after the last tile.
    best = tl.full((BM, BN), float("-inf"), tl.float32)
    origin = tl.zeros((BM, BN), tl.int32)
    for start in range(0, n, BN):
        j = start + lane
        there_b = j < n
        row_b = j
        if PICKED:
            row_b = tl.load(pick_b + batch * pick_b_batch + j, mask=there_b, other=0)
        if SCALED:
            right = tl.load(scale_b + batch * scale_b_batch + row_b * scale_step, mask=there_b, other=float("nan"))
        dots = tl.zeros((BM, BN), tl.float32)
        if ONE_STEP:
            tile_b = load_rows(b, row_b, there_b, b_row, feature, d)
            dots = dot_rows(tile_a, tile_b, dots, UPCAST, PRECISION)
            if not SCALED:
                right = tl.where(there_b, tile_scale(tile_b, EPS), float("nan"))
        else:
            for k in range(0, d, BK):
                tile_a = load_rows(a, row_a, there_a, a_row, k + feature, d)
                tile_b = load_rows(b, row_b, there_b, b_row, k + feature, d)
                dots = dot_rows(tile_a, tile_b, dots, UPCAST, PRECISION)
        # A column that may not be matched gets a NaN scale: NaN is greater than nothing.
        if VALID:
            free = tl.load(valid_b + batch * valid_batch + row_b, mask=there_b, other=0) != 0
            right = tl.where(free, right, float("nan"))
        # Written so that the cosine of i and j is bit for bit that of j and i: mutual neighbours tie.
        similarity = dots * (left[:, None] * right[None, :])
        better = similarity > best  # strict: an earlier tile wins a tie
        if DIAG:
            better = better & (i[:, None] != j[None, :])
        if RANKED:
            theirs = tl.load(rank_b + batch * n + j, mask=there_b, other=0)
            if RANKED == 1:
                better = better & (theirs[None, :] > mine[:, None])
            else:  # by falling score, the lower index first
                behind = (theirs[None, :] == mine[:, None]) & (j[None, :] > i[:, None])
                better = better & ((theirs[None, :] < mine[:, None]) | behind)
        best = tl.where(better, similarity, best)
        origin = tl.where(better, start, origin)
    top = tl.max(best, 1)
    column = tl.min(tl.where(best == top[:, None], origin + lane[None, :], 2147483647), 1)
    column = tl.where(top > float("-inf"), column, 0)
    if VALUES:
        tl.store(value + batch * m + i, top, mask=there_a)
    tl.store(index + batch * m + i, column.to(tl.int64) + offset, mask=there_a)


def match(
    a: Tensor,
    b: Tensor,
    index: Tensor,
    value: Tensor | None = None,
    *,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    pick_a: Tensor | None = None,
    pick_b: Tensor | None = None,
    rank_a: Tensor | None = None,
    rank_b: Tensor | None = None,
    exclude_diag: bool = False,
    valid_b: Tensor | None = None,
    offset: int = 0,
    config: Tile | None = None,
) -> None:
    """One launch of the kernel, after one for each side where row lengths are worth a pass of their own.

    Args:
        a: `[B, M, D]`, or `[B, N, D]` of which `pick_a` names M rows; last axis contiguous.
        b: likewise, in the dtype of `a`.
        index: int64 `[B, M]`, contiguous: gets the column, plus `offset`.
        value: fp32 `[B, M]`, contiguous, or None: gets the cosine.
        scale_a: fp32, `row_scale` of `a`, or None; and
        scale_b: that of `b`. Both or neither, with one stride of the last axis.
        pick_a: int64 `[B, M]`, last axis contiguous: the rows of `a` that match; and
        pick_b: int64 `[B, N]`, the rows of `b` that can be matched. Both or neither.
        rank_a: `[B, M]`, contiguous: ranks (int), or scores (fp32) by whose falling order rows rank; and
        rank_b: `[B, N]`, contiguous. Row i may only match columns of later rank.
        exclude_diag: row i may not match column i.
        valid_b: bool, one for every row of `b` (picked or not), last axis contiguous.
        offset: added to the column.
        config: a row of the tile table; None takes the one that fits.
    """
    batch, d = a.shape[0], a.shape[2]
    m = a.shape[1] if pick_a is None else pick_a.shape[1]
    n = b.shape[1] if pick_b is None else pick_b.shape[1]
    masked = exclude_diag or rank_a is not None
    config = config or tile("match_masked" if masked else "match", a.element_size(), d, batch * m)
    one_step, k = step(d, config.k)
    if scale_a is None and scales_first(one_step, config):
        scale_a, scale_b = row_scale(a), row_scale(b)
    launch(
        _match_kernel, batch * triton.cdiv(m, config.m), a,
        a, b, scale_a, scale_b, pick_a, pick_b, rank_a, rank_b, valid_b, value, index,
        m, n, d, offset,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        _batch_stride(scale_a), _batch_stride(scale_b), 1 if scale_a is None else scale_a.stride(1),
        _batch_stride(pick_a), _batch_stride(pick_b), _batch_stride(valid_b),
        warps=config.warps, stages=config.stages, SCALED=scale_a is not None, PICKED=pick_a is not None,
        DIAG=exclude_diag, RANKED=_ranked(rank_a), VALID=valid_b is not None, VALUES=value is not None,
        EPS=EPS, ONE_STEP=one_step, BM=config.m, BN=config.n, BK=k, **product(a.dtype),
    )  # fmt: skip


def _ranked(rank: Tensor | None) -> int:
    """How rows are ranked: not at all, by number, or by falling score."""
    if rank is None:
        return 0
    return 2 if rank.is_floating_point() else 1


def _batch_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def match_max(
    a: Tensor,
    b: Tensor,
    *,
    rank_a: Tensor | None = None,
    rank_b: Tensor | None = None,
    exclude_diag: bool = False,
    valid_b: Tensor | None = None,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.match_max` in Triton.

    Args:
        a: `[B, M, D]`.
        b: `[B, N, D]`, in a dtype of its own.
        rank_a: int `[B, M]`, or None.
        rank_b: int `[B, N]`, or None.
        exclude_diag: row i may not match column i.
        valid_b: bool `[B, N]`, or None.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        The cosine, fp32, and its column, int64, `[B, M]`.
    """
    same = a is b or (
        a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    )
    a, b = same_dtype(rows_of(a), rows_of(b))
    value = a.new_empty(a.shape[:2], dtype=torch.float32)
    index = a.new_empty(a.shape[:2], dtype=torch.int64)
    # A graph with itself must be symmetric bit for bit, so both sides use one scale.
    scale = row_scale(a) if same else None
    match(
        a, b, index, value, scale_a=scale, scale_b=scale,
        rank_a=None if rank_a is None else rank_a.contiguous(), rank_b=None if rank_b is None else rank_b.contiguous(),
        exclude_diag=exclude_diag, valid_b=None if valid_b is None else valid_b.contiguous(),
        config=config,
    )  # fmt: skip
    return value, index
