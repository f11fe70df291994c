"""Attention that each token receives, without the matrix of attention."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _logits(
    left, right, i, j, m, n, scale, bias, bias_i, bias_j,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Logits of the rows of two tiles, times log2(e)."""
    dots = dot_rows(left, right, tl.zeros((BM, BN), tl.float32), UPCAST, PRECISION) * scale
    if BIAS:
        at = bias + i.to(tl.int64)[:, None] * bias_i + j.to(tl.int64)[None, :] * bias_j
        more = tl.load(at, mask=(i < m)[:, None] & (j < n)[None, :], other=0.0)
        dots += more.to(tl.float32) * 1.4426950408889634
    return dots


@triton.jit(do_not_specialize=["m", "n"])
def _normaliser_kernel(
    q, k, bias, out, heads, shared, m, n, d, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, bias_batch, bias_head, bias_row, bias_column,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of the exponentials of every query row."""
    tiles = tl.cdiv(m, BM)
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)  # head x stride can exceed 32 bits
    batch = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    feature = tl.arange(0, BK)
    k += batch * k_batch + (head // shared) * k_head
    if BIAS:
        bias += batch * bias_batch + head * bias_head
    tile_q = load_rows(q + batch * q_batch + head * q_head, i, i < m, q_row, feature, d)
    most = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, n, BN):
        j = start + tl.arange(0, BN)
        tile_k = load_rows(k, j, j < n, k_row, feature, d)
        logits = _logits(
            tile_q, tile_k, i, j, m, n, scale, bias, bias_row, bias_column, BIAS, UPCAST, PRECISION, BM, BN
        )
        logits = tl.where((j < n)[None, :], logits, float("-inf"))
        most, total = add_exponentials(most, total, logits)
    # A row that sees nothing has log2(0) = -inf; -inf - -inf makes it NaN in the second pass, as in torch's softmax.
    tl.store(out + (batch * heads + head) * m + i, log_of_sum(most, total), mask=i < m)


@triton.jit(do_not_specialize=["m", "n"])
def _received_kernel(
    q, k, bias, normaliser, out, heads, shared, m, n, d, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, bias_batch, bias_head, bias_row, bias_column,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Attention that each key gets from one head, as its share of the mean over heads and query rows."""
    tiles = tl.cdiv(n, BM)
    j = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)  # head x stride can exceed 32 bits
    batch = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    feature = tl.arange(0, BK)
    q += batch * q_batch + head * q_head
    if BIAS:
        bias += batch * bias_batch + head * bias_head
    normaliser += (batch * heads + head) * m
    tile_k = load_rows(k + batch * k_batch + (head // shared) * k_head, j, j < n, k_row, feature, d)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, m, BN):
        i = start + tl.arange(0, BN)
        tile_q = load_rows(q, i, i < m, q_row, feature, d)
        logits = _logits(
            tile_k, tile_q, j, i, n, m, scale, bias, bias_column, bias_row, BIAS, UPCAST, PRECISION, BM, BN
        )
        base = tl.load(normaliser + i, mask=i < m, other=float("inf"))  # 2^-inf: rows that do not exist give nothing
        total += tl.exp2(logits - base[None, :])
    tl.store(out + (batch * heads + head) * n + j, tl.sum(total, 1) / (heads * m), mask=j < n)


def received_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    chunk: int = 256,
    config: Tile | None = None,
) -> Tensor:
    """`vlmtok.kernels.received_attention` in Triton: normalisers, sums per head, mean over heads.

    Args:
        q: `[B, H, L, d]`.
        k: `[B, Hkv, L, d]`.
        scale: factor of the logits.
        bias: broadcastable to `[B, H, L, L]`, or None.
        chunk: not used; the kernel's tiles are in the table.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        fp32 `[B, L]`.
    """
    q, k = same_dtype(rows_of(q), rows_of(k))
    batch, heads, m, d = q.shape
    groups, n = k.shape[1], k.shape[2]
    if batch * heads * m == 0 or n == 0:
        return q.new_zeros(batch, n, dtype=torch.float32)
    sums = q.new_empty(batch, heads, n, dtype=torch.float32)
    config = config or tile("received_attention", q.element_size(), d)
    spread = None if bias is None else bias.expand(batch, heads, m, n)
    strides = (0, 0, 0, 0) if spread is None else spread.stride()
    normaliser = q.new_empty(batch, heads, m, dtype=torch.float32)
    shape = (heads, heads // groups, m, n, d, float(scale) * LOG2E)
    steps = (*q.stride()[:3], *k.stride()[:3], *strides)
    settings = {"warps": config.warps, "stages": config.stages, "BIAS": bias is not None, **product(q.dtype)}
    settings |= {"BM": config.m, "BN": config.n, "BK": config.k}
    programs = batch * heads
    launch(
        _normaliser_kernel, programs * triton.cdiv(m, config.m), q, q, k, spread, normaliser, *shape, *steps, **settings
    )
    launch(
        _received_kernel, programs * triton.cdiv(n, config.m), q, q, k, spread, normaliser, sums, *shape, *steps,
        **settings,
    )  # fmt: skip
    return sums.sum(1)
