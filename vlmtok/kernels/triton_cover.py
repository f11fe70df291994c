"""Greedy choice by coverage: two launches a round, what each row adds, then the pick and what is covered."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference.coverage import TABLE_BYTES, covering_rows
from .reference.lazy_coverage import places_behind
from .table import Tile, tile
from .triton_common import launch
from .triton_greedy import products


@triton.jit(do_not_specialize=["n", "tiles"])
def _gains_kernel(
    table, cover, weight, behind, first, value, index, n, targets, tiles,
    WEIGHT: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scores of BM rows: the best of them and its index, or in the first pass each of them."""
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    i = (program % tiles) * BM + tl.arange(0, BM)
    there = i < n
    lane = tl.arange(0, BN)
    rows = table + (batch * n + i)[:, None] * targets
    cover += batch * targets
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(0, targets, BN):
        inside = at + lane < targets
        cell = tl.load(rows + (at + lane)[None, :], mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        more = cell - tl.load(cover + at + lane, mask=inside, other=0.0)[None, :]
        total += tl.where(more < 0, 0.0, more)  # NaN stays
    score = tl.sum(total, 1)
    if WEIGHT:
        score *= tl.load(weight + batch * n + i, mask=there, other=0.0)
    if FIRST:
        tl.store(first + batch * n + i, score, mask=there)
    else:
        place = tl.load(behind + batch * n + i, mask=there, other=float("inf"))
        score = tl.where(place > 0, -place, score)
        best = tl.max(score, 0)
        tl.store(value + program, best)
        tl.store(index + program, tl.min(tl.where(score == best, i, 2147483647), 0))  # the lowest index wins a tie


@triton.jit(do_not_specialize=["n", "tiles", "parts", "k", "step"])
def _pick_kernel(
    table, cover, behind, value, index, order, gain, n, targets, tiles, parts, k, step,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The best of all tiles, which every program finds for itself, and what is covered of BN targets then."""
    program = tl.program_id(0)
    batch = (program // parts).to(tl.int64)
    part = program % parts
    lane = tl.arange(0, BT)
    seen = tl.load(value + batch * tiles + lane, mask=lane < tiles, other=float("-inf"))
    best = tl.max(seen, 0)
    at = tl.load(index + batch * tiles + lane, mask=lane < tiles, other=2147483647)
    pick = tl.min(tl.where(seen == best, at, 2147483647), 0).to(tl.int64)
    target = part * BN + tl.arange(0, BN)
    inside = target < targets
    row = tl.load(table + (batch * n + pick) * targets + target, mask=inside, other=0.0).to(tl.float32)
    covered = tl.load(cover + batch * targets + target, mask=inside, other=0.0)
    tl.store(cover + batch * targets + target, tl.where(row > covered, row, covered), mask=inside)
    if part == 0:
        tl.store(order + batch * k + step, pick)
        tl.store(gain + batch * k + step, tl.where(best >= 0, best, float("nan")))
        tl.store(behind + batch * n + pick, float("inf"))


def greedy_cover(
    table: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    late: Tensor | None = None,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.greedy_cover` in Triton.

    Args:
        table: `[B, N, R]`.
        k: how many.
        weight: `[B, N]`, or None.
        late: int64 `[B, N]`, or None.
        config: a row of the tile table; None takes the one that fits.

    Returns:
        The choice, int64 `[B, k]`, and the gains, fp32 `[B, k]`.
    """
    batch, n, targets = table.shape
    order = table.new_empty(batch, k, dtype=torch.int64)
    gain = table.new_empty(batch, k, dtype=torch.float32)
    if k == 0 or batch == 0:
        return order, gain
    config = config or tile("greedy_cover", 4, n, batch * n)
    table = table.contiguous()
    if weight is not None:
        weight = weight.float().clamp(min=0.0).contiguous()
    tiles, parts = triton.cdiv(n, config.m), max(1, triton.cdiv(targets, config.n))
    cover = gain.new_zeros(batch, targets)
    first = gain.new_empty(batch, n)
    value = gain.new_empty(batch, tiles)
    index = torch.empty_like(value, dtype=torch.int32)

    def gains(behind: Tensor | None) -> None:
        launch(
            _gains_kernel, batch * tiles, table,
            table, cover, weight, behind, first, value, index, n, targets, tiles,
            warps=config.warps, WEIGHT=weight is not None, FIRST=behind is None, BM=config.m, BN=config.n,
        )  # fmt: skip

    gains(None)
    behind = places_behind(first, late).contiguous()
    for step in range(k):
        gains(behind)
        launch(
            _pick_kernel, batch * parts, table,
            table, cover, behind, value, index, order, gain, n, targets, tiles, parts, k, step,
            warps=config.warps, BT=triton.next_power_of_2(tiles), BN=config.n,
        )  # fmt: skip
    return order, gain


def greedy_cover_cosine(
    x: Tensor, k: int, *, weight: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`vlmtok.kernels.greedy_cover_cosine` in Triton: torch multiplies, as many pictures at a time as fit 2 GiB.

    Args:
        x: `[B, N, D]`.
        k: how many.
        weight: `[B, N]`, or None.
        valid: bool `[B, N]`, or None.

    Returns:
        As `greedy_cover`.
    """
    batch, n, _ = x.shape
    if k == 0 or batch == 0:
        return x.new_empty(batch, k, dtype=torch.int64), x.new_empty(batch, k, dtype=torch.float32)
    unit, weight, late = covering_rows(x, weight, valid)
    chosen = []
    group = max(1, TABLE_BYTES // (4 * n * n))
    for at in range(0, batch, group):
        part = slice(at, at + group)
        own = None if weight is None else weight[part]
        chosen.append(greedy_cover(products(unit[part]), k, weight=own, late=late[part]))
    return torch.cat([order for order, _ in chosen]), torch.cat([gain for _, gain in chosen])
