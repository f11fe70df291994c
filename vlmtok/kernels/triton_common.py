"""What the Triton kernels share: the launch, and loading and multiplying tiles of rows."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import INTERPRETS, KernelError
from .reference.rows import EPS
from .table import Tile

LOG2E = 1.4426950408889634
launches = 0
"""Kernels launched so far by this process, one program grid each."""


def launch(kernel: Any, programs: int, x: Tensor, *args: Any, warps: int, stages: int = 2, **constants: Any) -> None:
    """Launches a kernel on a one-dimensional grid, on the device and current stream of `x`.

    Args:
        kernel: what `triton.jit` made.
        programs: size of the grid; nothing happens for 0. (One axis: the others end at 65,535.)
        x: a tensor on the device.
        args: arguments of the kernel, in order.
        warps: warps of a program.
        stages: depth of the load pipeline.
        constants: its constexpr arguments.
    """
    global launches
    if programs == 0:
        return
    launches += 1
    if torch.version.hip:
        warps = min(warps, 16)  # 64 lanes a wave, 1,024 threads a program
    # Fusing multiply and add is today's default; saying so silences the notice that it will change.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **constants}
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)


def rows_of(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous; views over the other axes stay views."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes."""
    wide = torch.promote_types(a.dtype, b.dtype)
    if wide not in (torch.float16, torch.bfloat16, torch.float32):
        raise KernelError(f"the kernels take float16, bfloat16 and float32, not {a.dtype} with {b.dtype}")
    return a.to(wide), b.to(wide)


def product(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of `dot_rows` for a dtype.

    fp32 is multiplied as it is (Triton's default on NVIDIA is TF32). The interpreter computes garbage from bf16, so
    there tiles are widened first; the products are exact and the accumulator is fp32 on either path.
    """
    return {"UPCAST": INTERPRETS, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def step(d: int, k: int) -> tuple[bool, int]:
    """Whether d features fit one step of k, and the power of two to step by (a dot needs 16)."""
    return d <= k, max(16, min(k, triton.next_power_of_2(max(d, 1)))) if d <= k else k


def scales_first(one_step: bool, config: Tile) -> bool:
    """Whether row lengths are worth a launch of their own.

    They are where rows are read in steps, and where many programs would measure the same columns again; small grids
    are bound by the number of launches.
    """
    return not one_step or config.programs > 0


@triton.jit
def load_rows(x, rows, there, stride, features, d):
    """Tile of rows `[len(rows), len(features)]`; zeros where a row is not there or a feature is beyond d."""
    at = x + rows.to(tl.int64)[:, None] * stride + features[None, :]
    return tl.load(at, mask=there[:, None] & (features < d)[None, :], other=0.0)


@triton.jit
def dot_rows(a, b, accumulator, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the products of the rows of a with the rows of b, in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), accumulator, input_precision=PRECISION)


@triton.jit
def add_exponentials(most, total, logits):
    """Goes on with the sum of 2^logits of each row, kept as its greatest logit and the sum divided by 2 to that."""
    higher = tl.maximum(most, tl.max(logits, 1))
    # Where nothing is visible yet the maximum is -inf, and -inf - -inf would poison the sum.
    base = tl.where(higher > float("-inf"), higher, 0.0)
    return higher, total * tl.exp2(most - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)


@triton.jit
def log_of_sum(most, total):
    """log2 of that sum; -inf for a row that sees nothing."""
    return tl.where(most > float("-inf"), most, 0.0) + tl.log2(total)


@triton.jit
def _inverse(squares, EPS: tl.constexpr):
    """1 / length from squares `[rows, features]`; NaN where the length is not finite."""
    length = tl.sqrt(tl.sum(squares, 1))
    return tl.where(length < float("inf"), 1.0 / tl.maximum(length, EPS), float("nan"))


@triton.jit
def tile_scale(x, EPS: tl.constexpr):
    """1 / length of the rows of a tile, fp32; NaN for a row whose length is not finite."""
    wide = x.to(tl.float32)
    return _inverse(wide * wide, EPS)


@triton.jit(do_not_specialize=["rows", "n"])
def _scale_kernel(
    x, scale, query, cosine, rows, n, d, x_batch, x_row, query_batch,
    GUIDED: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < rows
    at = x + (row // n).to(tl.int64) * x_batch + (row % n).to(tl.int64) * x_row
    feature = tl.arange(0, BK)
    squares = tl.zeros((BM, BK), tl.float32)
    if GUIDED:  # a tile may hold rows of two pictures, so each reads its own query
        asks = query + (row // n).to(tl.int64) * query_batch
        products = tl.zeros((BM, BK), tl.float32)
        asked = tl.zeros((BM, BK), tl.float32)
    for k in range(0, d, BK):
        mask = there[:, None] & (k + feature < d)[None, :]
        tile = tl.load(at[:, None] + k + feature[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tile * tile
        if GUIDED:
            other = tl.load(asks[:, None] + k + feature[None, :], mask=mask, other=0.0).to(tl.float32)
            products += tile * other
            asked += other * other
    value = _inverse(squares, EPS)
    tl.store(scale + row, value, mask=there)
    if GUIDED:
        likeness = tl.sum(products, 1) * value * _inverse(asked, EPS)
        tl.store(cosine + row, tl.where(likeness == likeness, likeness, 0.0), mask=there)


def row_scale(x: Tensor, query: Tensor | None = None, cosine: Tensor | None = None) -> Tensor:
    """1 / length of every row, NaN for a row whose length is not finite; one launch.

    Args:
        x: `[B, N, D]`, last axis contiguous.
        query: `[B, D]`, last axis contiguous, or None.
        cosine: fp32 `[B, N]`, contiguous, given if and only if `query` is: gets the cosine of every row with its query,
            0 where one of both is not finite.

    Returns:
        fp32 `[B, N]`.
    """
    batch, n, d = x.shape
    scale = x.new_empty(batch, n, dtype=torch.float32)
    rows = batch * n
    k = max(16, min(256, triton.next_power_of_2(max(d, 1))))
    m = 16
    launch(
        _scale_kernel, triton.cdiv(rows, m), x,
        x, scale, query, cosine, rows, n, d, x.stride(0), x.stride(1), 0 if query is None else query.stride(0),
        warps=4, GUIDED=query is not None, EPS=EPS, BM=m, BK=k,
    )  # fmt: skip
    return scale
