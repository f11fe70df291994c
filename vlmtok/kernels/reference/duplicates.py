"""Taking rows with a near duplicate out of a list, some in each round."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import exact
from .duplicates_near import drop_by_neighbours
from .looking import host_may_look
from .matching import _match_unit
from .rows import finite_unit_rows, take_rows, unit_rows


def drop_duplicates(x: Tensor, order: Tensor, k: int, *, step: int = 8, valid: Tensor | None = None) -> Tensor:
    """Definition of `vlmtok.kernels.drop_duplicates`: in rounds, or on a CPU what compares fewer rows."""
    if k == 0 or order.shape[0] == 0:
        return order[:, :k]
    with exact(x.device):
        # Twice, as before this was an op: a rounding less swaps near ties, and with them up to half of what stays.
        unit = unit_rows(finite_unit_rows(x)[0])
        order, length = valid_first(order, k, valid)
        if host_may_look(x):
            lengths = [order.shape[1]] * len(order) if length is None else length.tolist()
            lists = [drop_by_neighbours(u, one[:n], k, step) for u, one, n in zip(unit, order, lengths)]
            return torch.stack(lists)
        while order.shape[1] > k:
            order, length = _round(unit, order, length, k, step)
    return order


def remaining(left: int, k: int, step: int) -> int:
    """How long a list of more than k is after a round: `step` leave, not below k, and none of its odd places."""
    return max(left - step, k, left // 2)


def lengths(left: int, k: int, step: int) -> list[int]:
    """How long a list is at the beginning of each round, until k or fewer are left."""
    found = []
    while left > k:
        found.append(left)
        left = remaining(left, k, step)
    return found


def valid_first(order: Tensor, k: int, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The lists with their valid rows in front, and how long they are.

    Args:
        order: int64 `[B, M]`.
        k: how many are to be left.
        valid: bool `[B, N]`, or None.

    Returns:
        int64 `[B, M]`; int64 `[B]`, how many of a list count, at least k, or None for all of them.
    """
    if valid is None:
        return order, None
    there = valid.gather(1, order)
    order = order.gather(1, (~there).to(torch.uint8).argsort(dim=1, stable=True))
    return order, there.sum(1).clamp(min=k)


def _round(
    unit: Tensor, order: Tensor, length: Tensor | None, k: int, step: int
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One round over every picture."""
    first, second = take_rows(unit, order[:, 0::2]), take_rows(unit, order[:, 1::2])
    counts = None if length is None else _places(order) < length.unsqueeze(1)
    nearest, _ = _match_unit(first, second, valid_b=None if counts is None else counts[:, 1::2])
    return deal(order, nearest, length, k, step)


def _places(order: Tensor) -> Tensor:
    return torch.arange(order.shape[1], device=order.device)


def deal(
    order: Tensor, nearest: Tensor, length: Tensor | None, k: int, step: int
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The lists after a round; one that is short enough stays as it is.

    Args:
        order: int64 `[B, L]`, more than k.
        nearest: fp32 `[B, ceil(L / 2)]`, how near the even places are to what they were compared with.
        length: int64 `[B]`, how many of a list count, or None for all.
        k: how many are to be left.
        step: how many leave.

    Returns:
        int64 `[B, remaining(L)]`, anything where no place counts; how many count.
    """
    left = order.shape[1]
    more = remaining(left, k, step)
    first, second = order[:, 0::2], order[:, 1::2]
    if length is None:
        stays = nearest.argsort(dim=1, descending=True, stable=True)[:, left - more :]
        return torch.cat([first.gather(1, stays), second], 1), None
    place = _places(order)
    nearest = nearest.masked_fill(place[0::2] >= length.unsqueeze(1), float("-inf"))
    ranked = first.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
    then = torch.maximum((length - step).clamp(min=k), length // 2)
    leave = (length - then).unsqueeze(1)
    stay = (length.unsqueeze(1) + 1) // 2 - leave  # of the first half; behind them comes the second
    place = place[:more]
    source = torch.where(place < stay, place + leave, first.shape[1] + place - stay).clamp(max=left - 1)
    dealt = torch.cat([ranked, second], 1).gather(1, source)
    return torch.where((length > k).unsqueeze(1), dealt, order[:, :more]), then
