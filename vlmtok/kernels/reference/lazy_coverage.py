"""The greedy choice by coverage on a CPU: the picks of the plain loop, bit for bit, by a small part of its work.

What a row adds can only fall while others are chosen, in floats too: a sum whose order of addition stays the same does
not grow when no term does, nor does its product with a weight that is not negative. So what a row was last seen to add
is an upper bound, and only rows whose bounds lead are summed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import take_rows

BLOCK = 64
"""Rows that are multiplied together where no table is held: always the same ones, so that their bits stay."""

_LEAST, _MOST = 16, 512  # rows summed again at a time, at first and at most
_ADAPT = 4  # rounds after which it is seen whether they were enough
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
    """The choice of `cover_plainly`; pictures go on together, as long as the slowest of them needs.

    Args:
        table: fp32 `[B, N, R]`, contiguous, on a CPU.
        k: how many.
        weight: fp32 `[B, N]`, not negative, or None.
        first: fp32 `[B, N]`, what each row adds to nothing.
        behind: fp32 `[B, N]`, what `places_behind` gives.

    Returns:
        The choice, int64 `[B, k]`, and the gains, fp32 `[B, k]`.
    """
    none = float("-inf")
    batch, n, targets = table.shape
    bound = first.masked_fill(behind > 0, none)
    seen = torch.full_like(bound, -1, dtype=torch.int64)  # the round in which a row was last summed
    cover = table.new_zeros(batch, 1, targets)
    least, most = (int(count) for count in (behind == 0).sum(1).aminmax())
    order, gain, width, spent = [], [], min(_LEAST, n), False
    best, at = bound.max(1, keepdim=True)
    for step in range(min(k, most)):
        some = width
        led: list[Tensor] = []
        while not spent:  # later bounds of nothing are what is added
            bounds, rows = bound.topk(some, dim=1, sorted=False)
            if led:  # of equal bounds topk takes any, perhaps not the lowest index
                bounds, rows = torch.cat([bounds, best], 1), torch.cat([rows, at], 1)
            own = None if weight is None else weight.gather(1, rows)
            more = added(take_rows(table, rows), cover, own)
            if some > least - step:  # a row that is chosen, or behind, may be among them
                more.masked_fill_(bounds == none, none)
            bound.scatter_(1, rows, more)
            seen.scatter_(1, rows, step)
            led.append(bounds)
            best, at = bound.max(1, keepdim=True)
            # No other bound is above these, so a sum that is above them is the largest.
            if bool((best > bounds.amin(1, keepdim=True)).all()):
                break
            spent = bool((best <= 0.0).all())
            if bool(((seen.gather(1, at) == step) | (best <= 0.0)).all()):
                break
            some = min(2 * some, _MOST, n)
        if step % _ADAPT == 0 or len(led) > 1:
            # As many as led this time, and some more, will mostly do the next time.
            ahead = sum(int((bounds > best).sum(1).max()) for bounds in led)
            width = min(max(_LEAST, min(_MOST, (6 * width + 3 * ahead) // 8)), n)
        order.append(at)
        gain.append(best)
        bound.scatter_(1, at, none)
        torch.maximum(cover, take_rows(table, at), out=cover)
        if spent:
            best, at = bound.max(1, keepdim=True)
    picks = torch.cat(order, 1) if order else torch.empty(batch, 0, dtype=torch.int64)
    gains = torch.cat(gain, 1) if gain else bound.new_empty(batch, 0)
    chosen = [_with_the_rest(*ours, k) for ours in zip(picks, gains, behind)]
    return torch.stack([one for one, _ in chosen]), torch.stack([one for _, one in chosen])


def _with_the_rest(order: Tensor, gain: Tensor, behind: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The candidates of a picture as chosen, and rows behind them up to k."""
    ranked = behind.argsort(stable=True)
    candidates = len(behind) - int((behind > 0).sum())
    order, gain = order[: min(k, candidates)], gain[: min(k, candidates)]
    rest = ranked[candidates:][: k - len(order)]
    return torch.cat([order, rest]), torch.cat([gain, gain.new_full(rest.shape, float("nan"))])


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
    picks = torch.tensor(order, dtype=torch.int64, device=unit.device)
    return _with_the_rest(picks, torch.tensor(gain, dtype=torch.float32, device=unit.device), behind, k)
