"""Cosine row maximum and its column, without the matrix of similarities."""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import EPS
from .table import Tile, tile
from .triton_common import dot_rows, inverse_length, launch, load_rows, product, row_length, rows_of, same_dtype, step


@triton.jit(do_not_specialize=["m", "n", "offset"])
def _match_kernel(
    a, b, length_a, length_b, pick_a, pick_b, rank_a, rank_b, valid_b, value, index,
    m, n, d, offset,
    a_batch, a_row, b_batch, b_row, length_a_batch, length_b_batch, pick_a_batch, pick_b_batch,
    MEASURED: tl.constexpr, PICKED: tl.constexpr, DIAG: tl.constexpr, RANKED: tl.constexpr, VALID: tl.constexpr,
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
    if MEASURED:
        norm_a = tl.load(length_a + batch * length_a_batch + row_a, mask=there_a, other=0.0)
    if ONE_STEP:
        tile_a = load_rows(a, row_a, there_a, a_row, feature, d)
        if not MEASURED:
            norm_a = row_length(tile_a)
    scale_a = inverse_length(norm_a, there_a, EPS)
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
        if VALID:
            there_b = there_b & (tl.load(valid_b + batch * n + j, mask=there_b, other=0) != 0)
        if MEASURED:
            # A row that is not finite is not loaded: its column is as good as masked.
            norm_b = tl.load(length_b + batch * length_b_batch + row_b, mask=there_b, other=float("inf"))
            there_b = there_b & (norm_b < float("inf"))
        dots = tl.zeros((BM, BN), tl.float32)
        if ONE_STEP:
            tile_b = load_rows(b, row_b, there_b, b_row, feature, d)
            dots = dot_rows(tile_a, tile_b, dots, UPCAST, PRECISION)
            if not MEASURED:
                norm_b = row_length(tile_b)
                there_b = there_b & (norm_b < float("inf"))
        else:
            for k in range(0, d, BK):
                tile_a = load_rows(a, row_a, there_a, a_row, k + feature, d)
                tile_b = load_rows(b, row_b, there_b, b_row, k + feature, d)
                dots = dot_rows(tile_a, tile_b, dots, UPCAST, PRECISION)
        scale_b = inverse_length(norm_b, there_b, EPS)
        # Written so that the cosine of i and j is bit for bit that of j and i: mutual neighbours tie.
        similarity = dots * (scale_a[:, None] * scale_b[None, :]) + tl.where(there_b, 0.0, float("-inf"))[None, :]
        if DIAG:
            similarity = tl.where(i[:, None] != j[None, :], similarity, float("-inf"))
        if RANKED:
            theirs = tl.load(rank_b + batch * n + j, mask=there_b, other=0)
            similarity = tl.where(theirs[None, :] > mine[:, None], similarity, float("-inf"))
        better = similarity > best  # strict: an earlier tile wins a tie, a NaN never wins
        best = tl.where(better, similarity, best)
        origin = tl.where(better, start, origin)
    top = tl.max(best, 1)
    column = tl.min(tl.where(best == top[:, None], origin + lane[None, :], 2147483647), 1)
    column = tl.where(top > float("-inf"), column, 0)
    if VALUES:
        tl.store(value + batch * m + i, top, mask=there_a)
    tl.store(index + batch * m + i, column.to(tl.int64) + offset, mask=there_a)


def lengths(x: Tensor) -> Tensor:
    """Lengths of the rows, fp32 `[B, N]`, in one pass."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def match(
    a: Tensor,
    b: Tensor,
    index: Tensor,
    value: Tensor | None = None,
    *,
    length_a: Tensor | None = None,
    length_b: Tensor | None = None,
    pick_a: Tensor | None = None,
    pick_b: Tensor | None = None,
    rank_a: Tensor | None = None,
    rank_b: Tensor | None = None,
    exclude_diag: bool = False,
    valid_b: Tensor | None = None,
    offset: int = 0,
    config: Tile | None = None,
) -> None:
    """One launch of the kernel (and, for long rows of unknown length, one that measures each side).

    Args:
        a: `[B, M, D]`, or `[B, N, D]` of which `pick_a` names M rows; last axis contiguous.
        b: likewise, in the dtype of `a`.
        index: int64 `[B, M]`, contiguous: gets the column, plus `offset`.
        value: fp32 `[B, M]`, contiguous, or None: gets the cosine.
        length_a: fp32, lengths of the rows of `a`, last axis contiguous; None lets the kernel measure them.
        length_b: likewise of `b`; both or neither.
        pick_a: int64 `[B, M]`, last axis contiguous: the rows of `a` that match; and
        pick_b: int64 `[B, N]`, the rows of `b` that can be matched. Both or neither.
        rank_a: int `[B, M]`, contiguous.
        rank_b: int `[B, N]`, contiguous.
        exclude_diag: row i may not match column i.
        valid_b: bool `[B, N]`, contiguous.
        offset: added to the column.
        config: a row of the tile table; None takes the one that fits.
    """
    batch, d = a.shape[0], a.shape[2]
    m = a.shape[1] if pick_a is None else pick_a.shape[1]
    n = b.shape[1] if pick_b is None else pick_b.shape[1]
    config = config or tile("match", a.element_size(), d, batch * m)
    one_step, k = step(d, config.k)
    if length_a is None and (not one_step or config.m >= 64):
        # Long rows are read in steps, and many programs would all measure the same columns.
        length_a, length_b = lengths(a), lengths(b)
    measured = length_a is not None
    launch(
        _match_kernel, batch * triton.cdiv(m, config.m), a,
        a, b, length_a, length_b, pick_a, pick_b, rank_a, rank_b, valid_b, value, index,
        m, n, d, offset,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        _batch_stride(length_a), _batch_stride(length_b), _batch_stride(pick_a), _batch_stride(pick_b),
        warps=config.warps, stages=config.stages, MEASURED=measured, PICKED=pick_a is not None, DIAG=exclude_diag,
        RANKED=rank_a is not None, VALID=valid_b is not None, VALUES=value is not None, EPS=EPS, ONE_STEP=one_step,
        BM=config.m, BN=config.n, BK=k, **product(a.dtype),
    )  # fmt: skip


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
) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.match_max` in Triton."""
    same = a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
    a, b = same_dtype(rows_of(a), rows_of(b))
    value = a.new_empty(a.shape[:2], dtype=torch.float32)
    index = a.new_empty(a.shape[:2], dtype=torch.int64)
    # A graph with itself must be symmetric bit for bit, so both sides use one measurement.
    length_a = length_b = lengths(a) if same else None
    match(
        a, b, index, value, length_a=length_a, length_b=length_b,
        rank_a=None if rank_a is None else rank_a.contiguous(), rank_b=None if rank_b is None else rank_b.contiguous(),
        exclude_diag=exclude_diag, valid_b=None if valid_b is None else valid_b.contiguous(),
    )  # fmt: skip
    return value, index
