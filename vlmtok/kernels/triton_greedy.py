"""Greedy diversity selection: one persistent program a picture over a table of products."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exact import exact
from .table import Tile, tile
from .triton_common import launch, row_scale, rows_of

_GRAM_BYTES = 1 << 31
"""Pictures are taken in groups whose products fill at most so much memory."""


@triton.jit
def _similarity(gram, norm, n, pick, j, there, METRIC: tl.constexpr):
    """Similarity of row `pick` with every row: cosine, or minus the squared distance; 0 where it is not finite."""
    # Norms are read again every step: held in registers they would halve the rows that fit.
    theirs = tl.load(norm + j, mask=there, other=0.0)
    mine = tl.load(norm + pick)
    value = tl.load(gram + pick * n + j, mask=there, other=0.0)
    if METRIC == 0:
        value = value * (mine * theirs)
    else:
        value = 2.0 * value - mine - theirs
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit(do_not_specialize=["n", "k"])
def _greedy_kernel(
    gram, norm, start, valid, order, state_out, n, k, start_step, valid_batch, valid_step,
    RULE: tl.constexpr, METRIC: tl.constexpr, VALID: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = 1e30
    batch = tl.program_id(0).to(tl.int64)
    gram += batch * n * n
    norm += batch * n
    order += batch * k
    state_out += batch * k
    j = tl.arange(0, BN)
    there = j < n
    pick = tl.load(start + batch * start_step)
    tl.store(order, pick)
    tl.store(state_out, float("nan"))
    # A row that is to be taken late has a state that no similarity reaches and that none changes: 1e30 where it is not
    # finite, 2e30 where it is not valid, infinity once it is chosen.
    inside = tl.where((pick >= 0) & (pick < n), pick, 0)  # another start would read foreign memory
    state = _similarity(gram, norm, n, inside, j, there, METRIC)
    FAR: tl.constexpr = 1.7e38 if METRIC else float("inf")  # twice such a squared length overflows
    state = tl.where(tl.load(norm + j, mask=there, other=0.0) < FAR, state, LAST)
    if VALID:
        allowed = tl.load(valid + batch * valid_batch + j * valid_step, mask=there, other=0) != 0
        state = tl.where(allowed, state, 2.0 * LAST)
    state = tl.where(there & (j != pick), state, float("inf"))
    for step in range(1, k):
        least = tl.min(state, 0)
        pick = tl.min(tl.where(state == least, j, 2147483647), 0).to(tl.int64)  # the lowest index wins a tie
        tl.store(order + step, pick)
        tl.store(state_out + step, tl.where(least < LAST, least, float("nan")))
        row = _similarity(gram, norm, n, pick, j, there, METRIC)
        row = tl.where(j == pick, float("inf"), row)
        if RULE == 0:
            state = tl.maximum(state, row)
        else:
            state += row


def products(x: Tensor) -> Tensor:
    """`x @ x^T` of every picture in fp32, `[B, N, N]`; products of halves are exact, so they take the tensor cores."""
    with exact(x.device):
        turned = x.transpose(1, 2)
        if x.is_cuda and x.dtype != torch.float32 and _HAS_OUT_DTYPE:
            return torch.bmm(x, turned, out_dtype=torch.float32)
        return torch.bmm(x.float(), turned.float())


_HAS_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype") and torch.version.hip is None


def greedy_select(
    x: Tensor,
    k: int,
    start: Tensor,
    *,
    rule: str = "max",
    metric: str = "cosine",
    valid: Tensor | None = None,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.greedy_select` in Triton.

    Args:
        x: `[B, N, D]`.
        k: how many.
        start: int64 `[B]`.
        rule: ``"max"`` or ``"sum"``.
        metric: ``"cosine"`` or ``"l2"``.
        valid: bool `[B, N]`, or None.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        The choice, int64 `[B, k]`, and the states, fp32 `[B, k]`.
    """
    x = rows_of(x)
    batch, n, _ = x.shape
    order = start.new_empty(batch, k)
    state = x.new_empty(batch, k, dtype=torch.float32)
    if k == 0 or batch == 0:
        return order, state
    config = config or tile("greedy_select", 4, n)
    scale = row_scale(x) if metric == "cosine" else None
    group = max(1, _GRAM_BYTES // (4 * n * n))
    for at in range(0, batch, group):
        part = slice(at, at + group)
        gram = products(x[part])
        norm = gram.diagonal(dim1=1, dim2=2).contiguous() if scale is None else scale[part]
        launch(
            _greedy_kernel, gram.shape[0], x,
            gram, norm, start[part], None if valid is None else valid[part], order[part], state[part],
            n, k, start.stride(0), 0 if valid is None else valid.stride(0), 0 if valid is None else valid.stride(1),
            warps=config.warps, RULE=int(rule == "sum"), METRIC=int(metric == "l2"), VALID=valid is not None,
            BN=config.n,
        )  # fmt: skip
    return order, state
