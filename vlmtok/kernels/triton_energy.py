"""PiToMe's energy without the matrix of similarities."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference.rows import EPS
from .table import Tile, tile
from .triton_common import dot_rows, launch, load_rows, product, row_scale, rows_of, scales_first, step, tile_scale

_KINDS = {"elu": 0, "paper": 1, "gaussian": 2}


@triton.jit(do_not_specialize=["n"])
def _energy_kernel(
    x, scale, out, n, d, margin, alpha, x_batch, x_row,
    KIND: tl.constexpr, SCALED: tl.constexpr, EPS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ONE_STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    SQRT_HALF_LOG2E: tl.constexpr = 0.8493218002880191
    INVERSE_SQRT_PI_LOG2E: tl.constexpr = 0.46971863934982566  # unit * this = 1 / (sigma sqrt(2 pi))
    PADDING: tl.constexpr = 1e30  # margin of columns that do not exist: so far below it, they add nothing
    tiles = tl.cdiv(n, BM)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    lane = tl.arange(0, BN)
    feature = tl.arange(0, BK)
    x += batch * x_batch
    there_a = i < n
    if SCALED:
        left = tl.load(scale + batch * n + i, mask=there_a, other=0.0)
    if ONE_STEP:
        tile_a = load_rows(x, i, there_a, x_row, feature, d)
        if not SCALED:
            left = tile_scale(tile_a, EPS)
    # Everything inside is in units in which the exponential is a power of 2. ELU splits into max(over, 0) and
    # 2^min(over, 0), whose sums are taken apart; alpha and the constants come in after the loop.
    if KIND == 2:
        unit = SQRT_HALF_LOG2E / (1.0 - margin)
    else:
        unit = LOG2E
    left *= unit
    margin *= unit
    above = tl.zeros((BM, BN), tl.float32)
    below = tl.zeros((BM, BN), tl.float32)
    for start in range(0, n, BN):
        j = start + lane
        there_b = j < n
        if SCALED:
            right = tl.load(scale + batch * n + j, mask=there_b, other=0.0)
        dots = tl.zeros((BM, BN), tl.float32)
        if ONE_STEP:
            tile_b = load_rows(x, j, there_b, x_row, feature, d)
            dots = dot_rows(tile_a, tile_b, dots, UPCAST, PRECISION)
            if not SCALED:
                right = tile_scale(tile_b, EPS)
        else:
            for k in range(0, d, BK):
                tile_a = load_rows(x, i, there_a, x_row, k + feature, d)
                tile_b = load_rows(x, j, there_b, x_row, k + feature, d)
                dots = dot_rows(tile_a, tile_b, dots, UPCAST, PRECISION)
        dots = dots * right[None, :]
        if not SCALED or KIND == 2:
            dots = tl.where((right == right)[None, :], dots, 0.0)  # a row that is not finite counts as a zero row
        if KIND == 2:
            distance = dots * left[:, None] - tl.where(there_b, unit, PADDING)[None, :]
            above += tl.exp2(-distance * distance)
        else:
            over = dots * left[:, None] - tl.where(there_b, margin, PADDING)[None, :]
            if KIND == 1:
                above += tl.where(over >= 0, over + margin, 0.0)
            else:
                above += tl.maximum(over, 0.0)
            below += tl.exp2(tl.minimum(over, 0.0))
    high = tl.sum(above, 1)
    low = tl.sum(below, 1)

    # What a zero row adds per column, and for a row that is itself not finite, in all.
    if KIND == 2:
        zero_high = tl.exp2(-unit * unit)
        zero_low = 0.0
    else:
        zero_high = tl.maximum(-margin, 0.0)
        if KIND == 1:
            zero_high = 0.0
        zero_low = tl.exp2(tl.minimum(-margin, 0.0))
    if SCALED and KIND != 2:
        # Columns with a NaN scale went through max and min, which take the number: they added 0 and 2^0.
        missing = tl.zeros((BN,), tl.float32)
        for start in range(0, n, BN):
            right = tl.load(scale + batch * n + start + lane, mask=start + lane < n, other=0.0)
            missing += tl.where(right == right, 0.0, 1.0)
        count = tl.sum(missing, 0)
        high += count * zero_high
        low += count * (zero_low - 1.0)
    bad = left != left
    high = tl.where(bad, zero_high * n, high)
    low = tl.where(bad, zero_low * n, low)
    if KIND == 2:
        total = high * unit * INVERSE_SQRT_PI_LOG2E
    else:
        total = high / LOG2E + alpha * (low - n)
    tl.store(out + batch * n + i, total / n, mask=there_a)


def energy(
    x: Tensor,
    *,
    margin: float,
    alpha: float = 1.0,
    kind: str = "elu",
    scale: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """`vlmtok.kernels.energy` in Triton.

    Args:
        x: `[B, N, D]`.
        margin: cosine from which on two tokens count as alike.
        alpha: slope below the margin.
        kind: ``"elu"``, ``"paper"`` or ``"gaussian"``.
        scale: fp32 `[B, N]`, `row_scale` of `x` where it is known already.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        fp32 `[B, N]`.
    """
    x = rows_of(x)
    batch, n, d = x.shape
    out = x.new_empty(batch, n, dtype=torch.float32)
    config = config or tile("energy", x.element_size(), d, batch * n)
    one_step, k = step(d, config.k)
    if scale is None and scales_first(one_step, config):
        scale = row_scale(x)
    launch(
        _energy_kernel, batch * triton.cdiv(n, config.m), x,
        x, scale, out, n, d, float(margin), float(alpha), x.stride(0), x.stride(1),
        warps=config.warps, stages=config.stages, KIND=_KINDS[kind], SCALED=scale is not None, EPS=EPS,
        ONE_STEP=one_step, BM=config.m, BN=config.n, BK=k, **product(x.dtype),
    )  # fmt: skip
    return out
