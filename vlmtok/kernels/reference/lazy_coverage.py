"""The greedy choice by coverage on a CPU: the picks of the plain loop, bit for bit, by a small part of its work.

What a row adds can only fall while others are chosen, in floats too: a sum whose order of addition stays the same does
not grow when no term does, nor does its product with a weight that is not negative. So what a row was last seen to add
is an upper bound, and only rows whose bounds lead are summed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Rows that are multiplied together where no table is held: always the same ones, so that their bits stay."""

_LEAST, _MOST = 16, 512  # rows summed again at a time, at first and at most
_STEP_BYTES = 1 << 20  # of the table, that a processor keeps near it
_BEHIND = (1 << 62) - 1  # the last place that `late` tells apart


def added(rows: Tensor, cover: Tensor, weight: Tensor | None = None) -> Tensor:
    """What each row adds to a coverage.

    Args:
        rows: fp32 `[..., M, R]`, contiguous.
        cover: fp32, broadcast to rows.
        weight: fp32 `[..., M]`, by which it is multiplied, or None.

    Returns:
        fp32 `[..., M]`. A row's bits depend on nothing but itself, the coverage and its weight.
    """
    more = (rows - cover).clamp_(min=0.0)
    # Torch splits the sum of a single row among threads, each other row is summed by one of them.
    total = more.sum(-1) if more.shape[:-1].numel() != 1 else torch.cat([more, more], -2).sum(-1)[..., :1]
    return total if weight is None else total * weight


def places_behind(first: Tensor, late: Tensor | None) -> Tensor:
    """Places of rows that follow behind the candidates.

    Args:
        first: fp32 `[..., N]`, what each row adds to nothing; a row that adds what is not finite is no candidate.
        late: int64 `[..., N]` or None.

    Returns:
        fp32 `[..., N]`: 0 for a candidate; the others 1 and more, rows that are not finite first, then by `late`, of
        equals the lowest index first.
    """
    tier = (~first.isfinite()).long()
    if late is not None:
        tier = torch.where(late > 0, late.clamp(max=_BEHIND) + 1, tier)
    place = tier.argsort(dim=-1, stable=True).argsort(dim=-1)
    return torch.where(tier > 0, place + 1, 0).float()


def split(table: Tensor) -> tuple[Tensor, ...]:
    """The rows of a table `[N, R]` in steps that stay near the processor."""
    return table.split(max(1, _STEP_BYTES // (4 * max(table.shape[1], 1))))


def cover_lazily(table: Tensor, k: int, weight: Tensor | None, first: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """The choice of `cover_plainly` for one picture.

    Args:
        table: fp32 `[N, R]`, contiguous, on a CPU.
        k: how many.
        weight: fp32 `[N]`, not negative, or None.
        first: fp32 `[N]`, what each row adds to nothing.
        behind: fp32 `[N]`, what `places_behind` gives.

    Returns:
        The choice, int64 `[k]`, and the gains, fp32 `[k]`.
    """
    bound = first.masked_fill(behind > 0, float("-inf"))
    seen = torch.zeros_like(bound, dtype=torch.int64)  # the round in which a row was last summed
    cover = table.new_zeros(table.shape[1])
    candidates = int((behind == 0).sum())
    order, gain, width = [], [], _LEAST
    for step in range(min(k, candidates)):
        some, before = width, []
        while True:
            best, at = bound.max(0)
            pick, value = int(at), float(best)
            if value == 0.0 or int(seen[pick]) == step:  # a bound of nothing is what is added
                break
            some = min(some, candidates - step)  # so that no row chosen before is among them
            bounds, rows = bound.topk(some, sorted=False)
            rows = torch.cat([rows, at.unsqueeze(0)])  # of equal bounds topk takes any, perhaps not the lowest index
            own = None if weight is None else weight.index_select(0, rows)
            bound.index_copy_(0, rows, added(table.index_select(0, rows), cover, own))
            seen.index_fill_(0, rows, step)
            before.append(bounds)
            some = min(2 * some, _MOST)
        # As many as led this time, and some more, will mostly do the next time.
        led = sum(int((bounds > best).sum()) for bounds in before)
        width = max(_LEAST, min(_MOST, (6 * width + 3 * led) // 8))
        order.append(pick)
        gain.append(value)
        bound[pick] = float("-inf")
        torch.maximum(cover, table[pick], out=cover)
    return _with_the_rest(order, gain, k, behind)


def _with_the_rest(order: list[int], gain: list[float], k: int, behind: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates chosen, and rows behind them up to k."""
    rest = behind.argsort(stable=True)[len(behind) - int((behind > 0).sum()) :][: k - len(order)]
    picks = torch.cat([torch.tensor(order, dtype=torch.int64, device=behind.device), rest])
    gains = torch.tensor(gain, dtype=torch.float32, device=behind.device)
    return picks, torch.cat([gains, gains.new_full(rest.shape, float("nan"))])


def cover_in_blocks(unit: Tensor, k: int, weight: Tensor | None, late: Tensor | None) -> tuple[Tensor, Tensor]:
    """The choice among rows that cover each other by their products, of which `BLOCK` rows are held at a time.

    Args:
        unit: fp32 `[N, D]`.
        k: how many.
        weight: fp32 `[N]`, not negative, or None.
        late: int64 `[N]`, or None, as `places_behind` takes it.

    Returns:
        The choice, int64 `[k]`, and the gains, fp32 `[k]`.
    """
    n, turned = len(unit), unit.t()
    held: tuple[int, Tensor] = (-1, unit)

    def block(number: int) -> Tensor:
        """Products of rows from `number * BLOCK` on; the last block is as high as the others."""
        nonlocal held
        if held[0] != number:
            low = max(0, min(number * BLOCK, n - BLOCK))
            held = number, (unit[low : low + BLOCK] @ turned)[number * BLOCK - low :]
        return held[1]

    def gains(number: int) -> Tensor:
        own = None if weight is None else weight[number * BLOCK : (number + 1) * BLOCK]
        return added(block(number), cover, own)

    cover = unit.new_zeros(n)
    numbers = range(-(-n // BLOCK))
    first = torch.cat([gains(number) for number in numbers])
    behind = places_behind(first, late)
    bound = first.masked_fill(behind > 0, float("-inf"))
    seen = [0 for _ in numbers]
    order: list[int] = []
    gain: list[float] = []
    for step in range(min(k, int((behind == 0).sum()))):
        while True:
            best, at = bound.max(0)
            number, value = int(at) // BLOCK, float(best)
            if value == 0.0 or seen[number] == step:
                break
            part = bound[number * BLOCK : (number + 1) * BLOCK]
            part.copy_(gains(number).masked_fill_(part.isneginf(), float("-inf")))
            seen[number] = step
        pick = int(at)
        order.append(pick)
        gain.append(value)
        bound[pick] = float("-inf")
        torch.maximum(cover, block(number)[pick - number * BLOCK], out=cover)
    return _with_the_rest(order, gain, k, behind)
