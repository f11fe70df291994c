"""The greedy choice by determinants on a CPU: rows of products only of what is chosen, or nearly.

A round needs the products of one row. They are multiplied for a block of rows at a time, the row chosen and those that
would be next as things stand; so many rows cost little more than one, and most of them are chosen soon.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .determinant_state import GONE, gains, keys
from .rows import products

BLOCK = 32
"""Rows that are multiplied together."""

STORE_BYTES = 64 << 20
"""Bytes of products that are kept for later rounds; the oldest make room."""


class _Rows:
    """Rows of products less what rows chosen before explain, of one picture; multiplied when they are asked for."""

    def __init__(self, unit: Tensor, factors: Tensor) -> None:
        n = len(unit)
        self.unit, self.factors = unit.unsqueeze(0), factors
        self.width = min(BLOCK, n)
        blocks = min(-(-n // self.width), max(1, STORE_BYTES // (4 * n * self.width)))
        self.store = unit.new_empty(blocks * self.width, n)
        self.rows: list[int] = [-1] * len(self.store)  # what each place of the store holds
        self.place: dict[int, int] = {}
        self.held = torch.zeros(n, dtype=torch.bool)
        self.done = [0] * len(self.store)  # chosen rows whose share is taken off already
        self.next = 0

    def row(self, pick: int, key: Tensor, t: int) -> Tensor:
        """The row of `pick` less the shares of the first t chosen; `key` says which rows may be next."""
        if pick not in self.place:
            self._multiply(pick, key, t)
        place = self.place[pick]
        past = self.factors[self.done[place] : t]
        return self.store[place] if not len(past) else torch.addmv(self.store[place], past.t(), past[:, pick], alpha=-1)

    def _multiply(self, pick: int, key: Tensor, t: int) -> None:
        places = range(self.next, self.next + self.width)
        for place in places:
            old = self.rows[place]
            if self.place.get(old) == place:  # it may have been multiplied again since, for want of others
                del self.place[old]
                self.held[old] = False
        ahead = key.masked_fill(self.held, GONE)
        ahead[pick] = torch.iinfo(torch.int32).max
        some = ahead.topk(self.width).indices
        block = self.store[places.start : places.stop]
        block.copy_(products(self.unit.index_select(1, some), self.unit)[0])
        if t:
            past = self.factors[:t]
            block.addmm_(past.index_select(1, some).t(), past, alpha=-1)
        self.held[some] = True
        for place, row in zip(places, some.tolist()):
            self.rows[place], self.place[row], self.done[place] = row, place, t
        self.next = places.stop % len(self.store)


def choose_by_rows(unit: Tensor, square: Tensor, left: Tensor, behind: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The choice for one picture.

    Args:
        unit: fp32 `[N, D]`, rows of length one or zero, on a CPU.
        square: fp32 `[N]`, as the two that follow what `beginning` gives; those are changed.
        left: fp32 `[N]`.
        behind: int32 `[N]`.
        k: how many, at least 1.

    Returns:
        The choice, int64 `[k]`, and the gains, fp32 `[k]`.
    """
    factors = unit.new_empty(k, len(unit))
    rows = _Rows(unit, factors)
    order: list[int] = []
    top: list[int] = []
    for t in range(k):
        key = keys(square, left, behind)
        best, at = key.max(0)
        if (value := int(best)) < 0:  # what is left is spanned, and stays so
            rest = behind.argsort(descending=True, stable=True)[: k - t]
            order += rest.tolist()
            top += behind[rest].tolist()
            break
        pick = int(at)
        order.append(pick)
        top.append(value)
        step = torch.div(rows.row(pick, key, t), math.sqrt(float(left[pick])), out=factors[t])
        left.addcmul_(step, step, value=-1)
        left[pick] = 0.0
        behind[pick] = GONE
    return torch.tensor(order), gains(torch.tensor(top, dtype=torch.int32))
