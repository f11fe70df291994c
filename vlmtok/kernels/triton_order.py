"""Whole matchings of a merge layer in two to five launches: match, then sort and write the plan."""

# mypy: allow-untyped-defs

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .table import LIMIT_ORDER, tile
from .triton_common import launch, row_scale, rows_of, scales_first, step
from .triton_energy import energy
from .triton_match import match, match_max

_BIPARTITE, _ALTERNATE, _HALVES, _COMPLETE = range(4)
_SPLITS = {"alternate": _ALTERNATE, "halves": _HALVES}


@triton.jit
def _falling(score, there, lane):
    """Lanes by falling score, the lower one first in a tie, NaN last, and lanes that are not there behind.

    One sort of 64-bit keys: the score as an integer of the same order, turned round, above the lane.
    """
    score = tl.where(score == 0, 0.0, score)  # -0 and 0 tie
    bits = score.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score == score, -rising - 1, 0x7FFFFFFF).to(tl.int64)
    packed = (key << 32) | lane.to(tl.int64)
    packed = tl.sort(tl.where(there, packed, 0x7FFFFFFFFFFFFFFF))
    return (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["scores", "others", "r", "first"])
def _order_kernel(
    score, minus, protected, partner, keep, src, dst, scores, others, r, first,
    MODE: tl.constexpr, ASCENDING: tl.constexpr, MINUS: tl.constexpr, PROTECTED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BN)
    there = lane < scores
    value = tl.load(score + batch * scores + lane, mask=there, other=0.0)
    if MODE == 3:
        if MINUS:
            value -= tl.load(minus + batch * scores + lane, mask=there, other=0.0).to(tl.float32)
        if PROTECTED:
            kept = tl.load(protected + batch * scores + lane, mask=there, other=0) != 0
            # Behind every other token, one without a partner (-inf) or with NaN included.
            value = tl.where(value > -3.4028234663852886e38, value, -3.4028234663852886e38)
            value = tl.where(kept, float("-inf"), value)
    order = _falling(value, there, lane)
    slots = scores + others - r
    keep += batch * slots
    src += batch * r
    if MODE == 0:
        # Scores belong to the even places, `first` + 2 x lane; the others are the odd ones.
        merged = lane < r
        tl.store(src + lane, (first + 2 * order).to(tl.int64), mask=merged)
        goal = tl.load(partner + batch * scores + order, mask=merged, other=0)
        tl.store(dst + batch * r + lane, goal + (scores - r), mask=merged)
        stay = order
        if ASCENDING:
            stay = tl.sort(tl.where((lane >= r) & there, order, 2147483647))
            tl.store(keep + lane, (first + 2 * stay).to(tl.int64), mask=lane < scores - r)
        else:
            tl.store(keep + lane - r, (first + 2 * stay).to(tl.int64), mask=(lane >= r) & there)
        tl.store(keep + scores - r + lane, (1 - first + 2 * lane).to(tl.int64), mask=lane < others)
    elif MODE == 3:
        tl.store(src + lane, order.to(tl.int64), mask=lane < r)
        stay = tl.sort(tl.where((lane >= r) & there, order, 2147483647))
        tl.store(keep + lane, stay.to(tl.int64), mask=lane < scores - r)
    else:
        if MODE == 1:
            source = (lane < 2 * r) & (lane % 2 == 0)
            target = (lane < 2 * r) & (lane % 2 == 1)
            place = lane // 2
        else:
            source = lane < r
            target = (lane >= r) & (lane < 2 * r)
            place = tl.where(source, lane, lane - r)
        tl.store(src + place, order.to(tl.int64), mask=source)
        place = tl.where(target, scores - 2 * r + place, lane - 2 * r)
        tl.store(keep + place, order.to(tl.int64), mask=there & (lane >= tl.where(MODE == 1, 0, r)) & (source == 0))


def _order(
    score: Tensor,
    keep: Tensor,
    src: Tensor,
    mode: int,
    *,
    dst: Tensor | None = None,
    partner: Tensor | None = None,
    minus: Tensor | None = None,
    protected: Tensor | None = None,
    first: int = 0,
    others: int = 0,
    ascending: bool = False,
) -> None:
    """One launch: a program sorts the scores of a picture and writes its plan."""
    batch, scores = score.shape
    config = tile("order", 8, max(scores, others))
    launch(
        _order_kernel, batch, score,
        score, minus, protected, partner, keep, src, dst, scores, others, src.shape[1], first,
        warps=config.warps, MODE=mode, ASCENDING=ascending, MINUS=minus is not None, PROTECTED=protected is not None,
        BN=config.n,
    )  # fmt: skip


def _plan(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for keep, src and dst."""
    batch, n, _ = metric.shape
    keep = torch.empty(batch, n - r, dtype=torch.int64, device=metric.device)
    return keep, keep.new_empty(batch, r), keep.new_empty(batch, r)


def bipartite_match(metric: Tensor, r: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`vlmtok.kernels.bipartite_match` in Triton: match, order (and row lengths first, on large grids)."""
    batch, _, d = metric.shape
    first = num_prefix % 2
    metric = rows_of(metric)
    even, odd = metric[:, first::2], metric[:, 1 - first :: 2]
    rows = even.shape[1]
    if max(rows, odd.shape[1]) > LIMIT_ORDER:
        return reference.bipartite_match(metric, r, num_prefix, match=match_max)
    keep, src, dst = _plan(metric, r)
    value = metric.new_empty(batch, rows, dtype=torch.float32)
    partner = src.new_empty(batch, rows)
    config = tile("match", metric.element_size(), d, batch * rows)
    scale_a = scale_b = None
    if scales_first(step(d, config.k)[0], config):
        scale = row_scale(metric)
        scale_a, scale_b = scale[:, first::2], scale[:, 1 - first :: 2]
    match(even, odd, partner, value, scale_a=scale_a, scale_b=scale_b, config=config)
    _order(
        value, keep, src, _BIPARTITE, dst=dst, partner=partner, first=first, others=odd.shape[1],
        ascending=num_prefix > 0,
    )  # fmt: skip
    return keep, src, dst


def energy_match(
    metric: Tensor,
    r: int,
    *,
    margin: float,
    alpha: float = 1.0,
    kind: str = "elu",
    split: str = "alternate",
    protect: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`vlmtok.kernels.energy_match` in Triton: energy, order, match."""
    batch, n, d = metric.shape
    metric = rows_of(metric)
    if not protect or n > LIMIT_ORDER:
        return reference.energy_match(
            metric, r, margin=margin, alpha=alpha, kind=kind, split=split, protect=protect,
            energy_of=energy, match=match_max,
        )  # fmt: skip
    keep, src, dst = _plan(metric, r)
    config = tile("energy", metric.element_size(), d, batch * n)
    scale = row_scale(metric) if scales_first(step(d, config.k)[0], config) else None
    score = energy(metric, margin=margin, alpha=alpha, kind=kind, scale=scale)
    _order(score, keep, src, _SPLITS[split])
    match(metric, metric, dst, scale_a=scale, scale_b=scale, pick_a=src, pick_b=keep[:, n - 2 * r :], offset=n - 2 * r)
    return keep, src, dst


def complete_match(
    metric: Tensor, importance: Tensor | None, r: int, protected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`vlmtok.kernels.complete_match` in Triton: row lengths, best, best of later rank, order, partners."""
    metric = rows_of(metric)
    if metric.shape[1] > LIMIT_ORDER:
        return reference.complete_match(metric, importance, r, protected, match=match_max)
    return _complete(metric, row_scale(metric), importance, r, protected)


def guided_match(metric: Tensor, query: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vlmtok.kernels.guided_match` in Triton: as `complete_match`; the first launch measures the importance too."""
    metric = rows_of(metric)
    importance = metric.new_empty(metric.shape[:2], dtype=torch.float32)
    scale = row_scale(metric, rows_of(query), importance)
    if metric.shape[1] > LIMIT_ORDER:
        return *reference.complete_match(metric, importance, r, match=match_max), importance
    return *_complete(metric, scale, importance, r), importance


def _complete(
    metric: Tensor, scale: Tensor, importance: Tensor | None, r: int, protected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The four launches that follow the row lengths."""
    batch, n, _ = metric.shape
    keep, src, dst = _plan(metric, r)
    mask = None if protected is None else protected.contiguous()
    free = None if mask is None else ~mask
    best = metric.new_empty(batch, n, dtype=torch.float32)
    later = torch.empty_like(best)
    place = src.new_empty(batch, n)
    match(metric, metric, place, best, scale_a=scale, scale_b=scale, exclude_diag=True, valid_b=free)
    match(metric, metric, place, later, scale_a=scale, scale_b=scale, rank_a=best, rank_b=best, valid_b=free)
    minus = None if importance is None else importance.contiguous()
    _order(later, keep, src, _COMPLETE, minus=minus, protected=mask)
    match(metric, metric, dst, scale_a=scale, scale_b=scale, pick_a=src, pick_b=keep, valid_b=free)
    return keep, src, dst
