"""Norm ratio and cosine of two rows in one pass."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import Tile, tile
from .triton_common import launch


@triton.jit
def _transition_kernel(x, y, ratio, cosine, d, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * d
    y += row * d
    xx = tl.zeros((BD,), tl.float32)
    yy = tl.zeros((BD,), tl.float32)
    xy = tl.zeros((BD,), tl.float32)
    for at in range(0, d, BD):
        channel = at + tl.arange(0, BD)
        a = tl.load(x + channel, mask=channel < d, other=0.0).to(tl.float32)
        b = tl.load(y + channel, mask=channel < d, other=0.0).to(tl.float32)
        xx += a * a
        yy += b * b
        xy += a * b
    nx = tl.sqrt(tl.sum(xx, 0))
    ny = tl.sqrt(tl.sum(yy, 0))
    quotient = ny / tl.maximum(nx, 1.1754943508222875e-38)
    tl.store(ratio + row, tl.where(nx > 0, quotient, 0.0))
    nx = tl.where(nx < 1e-8, 1e-8, nx)  # a NaN stays
    ny = tl.where(ny < 1e-8, 1e-8, ny)
    tl.store(cosine + row, tl.sum(xy, 0) / (nx * ny))


def transition_stats(x: Tensor, y: Tensor, *, config: Tile | None = None) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.transition_stats` in Triton.

    Args:
        x: `[..., L, C]`.
        y: `[..., L, C]`, in a dtype of its own.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        Ratio and cosine, fp32 `[..., L]`.
    """
    rows, d = x.shape[:-1], x.shape[-1]
    ratio, cosine = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    config = config or tile("transition_stats", max(x.element_size(), y.element_size()), d)
    launch(
        _transition_kernel, rows.numel(), x, x.contiguous(), y.contiguous(), ratio, cosine, d,
        warps=config.warps, BD=config.n,
    )  # fmt: skip
    return ratio, cosine
