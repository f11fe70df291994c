"""Greedy choice by determinants: one persistent program a picture, or for long ones one launch a round."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference.determinant import has_table, pictures_at_a_time
from .reference.determinant_state import SPANNED
from .reference.rows import EPS
from .table import LIMIT_DETERMINANT, Tile, tile
from .triton_common import launch, load_rows, row_scale, rows_of
from .triton_greedy import _similarity, products

_FEATURES = 64
"""Features that are multiplied at a time where no table is held."""
_AHEAD, _AHEAD_ROUND = 8, 32
"""Factors that are read before the first is used; a round has fewer threads, so each reads more."""


@triton.jit
def _weight(relevance, first, j, there, step, RELEVANCE: tl.constexpr):
    """The factors of rows: not negative, finite, 0 for NaN."""
    if RELEVANCE:
        weight = tl.load(relevance + first + j * step, mask=there, other=0.0).to(tl.float32)
        return tl.where(weight > 0, tl.minimum(weight, 3.4028234663852886e38), 0.0)
    return tl.where(there, 1.0, 0.0)


@triton.jit
def _beginning(weight, scale, valid, first, n, j, there, step, VALID: tl.constexpr, EPS: tl.constexpr):
    """The variance of rows before the first round, and their places where they have none (see the definition)."""
    theirs = tl.load(scale + j, mask=there, other=float("nan"))
    free = theirs == theirs
    late = -0x7F800001 - j
    if VALID:
        allowed = tl.load(valid + first + j * step, mask=there, other=0) != 0
        free = free & allowed
        late = tl.where(allowed, late, late - n)
    behind = tl.where(free, weight.to(tl.int32, bitcast=True) - 0x7F800000, late)
    left = tl.where(free & (theirs < 0.9999 / EPS), 1.0, 0.0)  # a zero row has the greatest scale
    return left, tl.where(there, behind, -0x80000000)


@triton.jit
def _key(weight, left, behind, SPANNED: tl.constexpr):
    """The bits of a row's gain, or its place behind all gains."""
    return tl.where(left > SPANNED, (weight * weight * left).to(tl.int32, bitcast=True), behind)


@triton.jit
def _explained(factors, n, pick, j, there, t, AHEAD: tl.constexpr, BN: tl.constexpr):
    """What the first t factors say of row `pick` with the others."""
    lane = tl.arange(0, AHEAD)
    total = tl.zeros((AHEAD, BN), tl.float32)
    for first in range(0, t, AHEAD):
        use = first + lane < t
        at = factors + (first + lane) * n
        mine = tl.load(at + pick, mask=use, other=0.0)
        total += mine[:, None] * tl.load(at[:, None] + j[None, :], mask=use[:, None] & there[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _gain(best):
    """The gain in a key; NaN where it is a place."""
    return tl.where(best >= 0, best.to(tl.float32, bitcast=True), float("nan"))


@triton.jit(do_not_specialize=["n", "k"])
def _determinant_kernel(
    table, scale, relevance, valid, factors, order, gain,
    n, k, relevance_batch, relevance_step, valid_batch, valid_step,
    RELEVANCE: tl.constexpr, VALID: tl.constexpr, SPANNED: tl.constexpr, EPS: tl.constexpr, AHEAD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    table += batch * n * n
    scale += batch * n
    factors += batch * k * n
    order += batch * k
    gain += batch * k
    j = tl.arange(0, BN)
    there = j < n
    weight = _weight(relevance, batch * relevance_batch, j, there, relevance_step, RELEVANCE)
    left, behind = _beginning(weight, scale, valid, batch * valid_batch, n, j, there, valid_step, VALID, EPS)
    for t in range(0, k):
        key = _key(weight, left, behind, SPANNED)
        best = tl.max(key, 0)
        pick = tl.min(tl.where(key == best, j, 2147483647), 0)  # the lowest index wins a tie
        tl.store(order + t, pick.to(tl.int64))
        tl.store(gain + t, _gain(best))
        variance = tl.sum(tl.where(j == pick, left, 0.0), 0)
        row = _similarity(table, scale, n, pick, j, there, 0)
        row -= _explained(factors, n, pick, j, there, tl.where(best >= 0, t, 0), AHEAD, BN)
        # A spanned row leaves the others as they are.
        step = tl.where(best >= 0, row / tl.sqrt(tl.maximum(variance, SPANNED)), 0.0)
        tl.store(factors + t * n + j, step, mask=there)
        left = tl.where(j == pick, 0.0, left - step * step)
        behind = tl.where(j == pick, -0x80000000, behind)
        tl.debug_barrier()  # the next round reads factors that other threads have written


@triton.jit(do_not_specialize=["batches", "n", "k", "t"])
def _round_kernel(
    x, table, scale, relevance, valid, left, behind, factors, best, place, variance, order, gain,
    batches, n, k, t, d, x_batch, x_row, relevance_batch, relevance_step, valid_batch, valid_step,
    FIRST: tl.constexpr, TABLE: tl.constexpr, RELEVANCE: tl.constexpr, VALID: tl.constexpr, SPANNED: tl.constexpr,
    EPS: tl.constexpr, AHEAD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Launch t takes row t - 1 by what the programs of launch t - 1 found in their parts, and looks for the next.
    parts = tl.cdiv(n, BN)
    batch = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    scale += batch * n
    j = part * BN + tl.arange(0, BN)
    there = j < n
    weight = _weight(relevance, batch * relevance_batch, j, there, relevance_step, RELEVANCE)
    if FIRST:
        own, after = _beginning(weight, scale, valid, batch * valid_batch, n, j, there, valid_step, VALID, EPS)
    else:
        lane = tl.arange(0, PARTS)
        found = ((t - 1) % 2 * batches + batch) * parts + lane
        key = tl.load(best + found, mask=lane < parts, other=-0x80000000)
        places = tl.load(place + found, mask=lane < parts, other=2147483647)
        top = tl.max(key, 0)
        pick = tl.min(tl.where(key == top, places, 2147483647), 0)
        theirs = tl.load(variance + found, mask=lane < parts, other=0.0)
        theirs = tl.sum(tl.where(places == pick, theirs, 0.0), 0)
        tl.store(order + batch * k + t - 1, pick.to(tl.int64), mask=part == 0)
        tl.store(gain + batch * k + t - 1, _gain(top), mask=part == 0)
        if TABLE:
            row = _similarity(table + batch * n * n, scale, n, pick, j, there, 0)
        else:
            row = tl.zeros((BN,), tl.float32)
            x += batch * x_batch
            feature = tl.arange(0, BK)
            for at in range(0, d, BK):
                mine = tl.load(x + pick.to(tl.int64) * x_row + at + feature, mask=at + feature < d, other=0.0)
                rows = load_rows(x, j, there, x_row, at + feature, d)
                row += tl.sum(rows.to(tl.float32) * mine.to(tl.float32)[None, :], 1)
            row *= tl.load(scale + pick) * tl.load(scale + j, mask=there, other=0.0)
            row = tl.where(tl.abs(row) < float("inf"), row, 0.0)
        factors += batch * k * n
        row -= _explained(factors, n, pick, j, there, tl.where(top >= 0, t - 1, 0), AHEAD, BN)
        step = tl.where(top >= 0, row / tl.sqrt(tl.maximum(theirs, SPANNED)), 0.0)
        tl.store(factors + (t - 1) * n + j, step, mask=there)
        own = tl.load(left + batch * n + j, mask=there, other=0.0)
        own = tl.where(j == pick, 0.0, own - step * step)
        after = tl.load(behind + batch * n + j, mask=there, other=-0x80000000)
        after = tl.where(j == pick, -0x80000000, after)
    tl.store(left + batch * n + j, own, mask=there)
    tl.store(behind + batch * n + j, after, mask=there)
    key = _key(weight, own, after, SPANNED)
    top = tl.max(key, 0)
    pick = tl.min(tl.where(key == top, j, 2147483647), 0)
    found = (t % 2 * batches + batch) * parts + part
    tl.store(best + found, top)
    tl.store(place + found, pick)
    tl.store(variance + found, tl.sum(tl.where(j == pick, own, 0.0), 0))


def greedy_determinant(
    x: Tensor, k: int, *, relevance: Tensor | None = None, valid: Tensor | None = None, config: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.greedy_determinant` in Triton.

    Args:
        x: `[B, N, D]`.
        k: how many.
        relevance: floating `[B, N]`, or None.
        valid: bool `[B, N]`, or None.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        The choice, int64 `[B, k]`, and the gains, fp32 `[B, k]`.
    """
    x = rows_of(x)
    batch, n, _ = x.shape
    order = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    gain = x.new_empty(batch, k, dtype=torch.float32)
    if k == 0 or batch == 0:
        return order, gain
    scale = row_scale(x)
    group = pictures_at_a_time(batch, n)
    for at in range(0, batch, group):
        part = slice(at, at + group)
        factor = None if relevance is None else relevance[part]
        candidates = None if valid is None else valid[part]
        _choose(x[part], scale[part], factor, candidates, order[part], gain[part], config)
    return order, gain


def _choose(
    x: Tensor, scale: Tensor, relevance: Tensor | None, valid: Tensor | None, order: Tensor, gain: Tensor,
    config: Tile | None,
) -> None:  # fmt: skip
    """The launches for pictures whose tables are held together."""
    batch, n, d = x.shape
    k = order.shape[1]
    table = products(x) if has_table(n) else None
    factors = x.new_empty(batch, k, n, dtype=torch.float32)
    strides = (*_strides(relevance), *_strides(valid))
    shared: dict[str, Any] = {
        "RELEVANCE": relevance is not None,
        "VALID": valid is not None,
        "SPANNED": SPANNED,
        "EPS": EPS,
    }
    if n <= LIMIT_DETERMINANT:
        config = config or tile("determinant", 4, n)
        launch(
            _determinant_kernel, batch, x,
            table, scale, relevance, valid, factors, order, gain, n, k, *strides,
            warps=config.warps, BN=config.n, AHEAD=_AHEAD, **shared,
        )  # fmt: skip
        return
    config = config or tile("determinant_round", 4, n)
    parts = triton.cdiv(n, config.n)
    left, behind = torch.empty_like(scale), torch.empty_like(scale, dtype=torch.int32)
    best, place, variance = (
        torch.empty(2, batch, parts, dtype=dtype, device=x.device)
        for dtype in (torch.int32, torch.int32, torch.float32)
    )
    for t in range(k + 1):
        launch(
            _round_kernel, batch * parts, x,
            x, table, scale, relevance, valid, left, behind, factors, best, place, variance, order, gain,
            batch, n, k, t, d, x.stride(0), x.stride(1), *strides,
            warps=config.warps, FIRST=t == 0, TABLE=table is not None, AHEAD=_AHEAD_ROUND, BN=config.n, BK=_FEATURES,
            PARTS=triton.next_power_of_2(parts), **shared,
        )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
