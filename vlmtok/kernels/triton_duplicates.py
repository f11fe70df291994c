"""Removal of near duplicates in two launches a round: who is nearest, then the next lists."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference.duplicates import deal, remaining, valid_first
from .reference.rows import EPS
from .table import LIMIT_ORDER, tile
from .triton_common import launch, row_scale, rows_of
from .triton_match import match
from .triton_order import _falling


@triton.jit
def _place(first, second, place, token, use):
    """Writes tokens to places of a list that is dealt into two halves."""
    half = place // 2
    tl.store(first + half, token, mask=use & (place % 2 == 0))
    tl.store(second + half, token, mask=use & (place % 2 == 1))


@triton.jit(do_not_specialize=["left", "more", "keep", "step"])
def _deal_kernel(
    nearest, first, second, length, next_first, next_second, next_length, filler,
    left, more, keep, step,
    LENGTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    nearest += batch * ((left + 1) // 2)
    first += batch * ((left + 1) // 2)
    second += batch * (left // 2)
    next_first += batch * ((more + 1) // 2)
    next_second += batch * (more // 2)
    lane = tl.arange(0, BN)
    count = left
    if LENGTH:
        count = tl.load(length + batch).to(tl.int32)
    then = tl.maximum(tl.maximum(count - step, keep), count // 2)
    leave = count - then
    mine = (count + 1) // 2
    there = lane < mine
    ranked = _falling(tl.load(nearest + lane, mask=there, other=0.0), there, lane)
    done = count <= keep  # a list that is short enough stays as it is
    token = tl.load(first + tl.where(done, lane, ranked), mask=there, other=0)
    _place(next_first, next_second, tl.where(done, 2 * lane, lane - leave), token, there & (lane >= leave))
    other = lane < count // 2
    token = tl.load(second + lane, mask=other, other=0)
    _place(next_first, next_second, tl.where(done, 2 * lane + 1, mine - leave + lane), token, other)
    if LENGTH:
        # Places that do not count hold a row that is not valid, which no row is compared with.
        token = tl.load(filler + batch)
        tl.store(next_first + lane, token, mask=(2 * lane >= then) & (2 * lane < more))
        tl.store(next_second + lane, token, mask=(2 * lane + 1 >= then) & (2 * lane + 1 < more))
        tl.store(next_length + batch, then.to(tl.int64))


def drop_duplicates(x: Tensor, order: Tensor, k: int, *, step: int = 8, valid: Tensor | None = None) -> Tensor:
    """`vlmtok.kernels.drop_duplicates` in Triton.

    Args:
        x: `[B, N, D]`.
        order: int64 `[B, M]`.
        k: how many stay.
        step: how many leave in a round.
        valid: bool `[B, N]`, or None.

    Returns:
        int64 `[B, k]`.
    """
    batch = x.shape[0]
    if k == 0 or batch == 0 or (order.shape[1] == k and valid is None):
        return order[:, :k].contiguous()
    x = rows_of(x)
    # A row that is not finite compares as a zero row does.
    scale = row_scale(x)
    bad = scale.isnan()
    x, scale = x.masked_fill(bad.unsqueeze(-1), 0.0), scale.masked_fill(bad, 1.0 / EPS)
    order, length = valid_first(order, k, valid)
    valid = None if valid is None else valid.contiguous()
    filler = None if length is None else order[:, -1].contiguous()
    first, second = _halves(order)
    left = order.shape[1]
    while left > k:
        rows, more = first.shape[1], remaining(left, k, step)
        nearest = scale.new_empty(batch, rows)
        column = torch.empty_like(first)
        match(
            x, x, column, nearest, scale_a=scale, scale_b=scale, pick_a=first, pick_b=second, valid_b=valid
        )  # fmt: skip
        then = None if length is None else torch.empty_like(length)
        if rows <= LIMIT_ORDER:
            config = tile("order", 8, rows)
            next_first, next_second = first.new_empty(batch, (more + 1) // 2), first.new_empty(batch, more // 2)
            launch(
                _deal_kernel, batch, x,
                nearest, first, second, length, next_first, next_second, then, filler, left, more, k, step,
                warps=config.warps, LENGTH=length is not None, BN=config.n,
            )  # fmt: skip
            first, second = next_first, next_second
        else:
            order, then = deal(_joined(first, second), nearest, length, k, step)
            if filler is not None and then is not None:
                counts = torch.arange(more, device=x.device) < then.unsqueeze(1)
                order = torch.where(counts, order, filler.unsqueeze(1))
            first, second = _halves(order)
        left, length = more, then
    return _joined(first, second)


def _halves(order: Tensor) -> tuple[Tensor, Tensor]:
    """A list as it is dealt."""
    return order[:, 0::2].contiguous(), order[:, 1::2].contiguous()


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """The list of two halves."""
    order = first.new_empty(first.shape[0], first.shape[1] + second.shape[1])
    order[:, 0::2], order[:, 1::2] = first, second
    return order
