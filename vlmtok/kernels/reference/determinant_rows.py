"""The greedy choice by determinants on a CPU: rows of products only of what is chosen, or nearly.

A round needs the products of one row. They are multiplied for a block of rows at a time, the row chosen and those that
would be next as things stand; so many rows cost little more than one, and most of them are chosen soon.
"""

from __future__ import annotations

import math
from collections import deque

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
        self.most = max(1, STORE_BYTES // (4 * n * self.width))
        self.blocks: deque[tuple[Tensor, list[int], int]] = deque()  # products, whose, and chosen rows taken off
        self.place: dict[int, tuple[tuple[Tensor, list[int], int], int]] = {}  # the block and the line in it
        self.held = torch.zeros(n, dtype=torch.bool)

    def row(self, pick: int, key: Tensor, t: int) -> Tensor:
        """The row of `pick` less the shares of the first t chosen; `key` says which rows may be next."""
        if pick not in self.place:
            self._multiply(pick, key, t)
        (block, _, done), line = self.place[pick]
        if done == t:
            return block[line]
        past = self.factors[done:t]
        return torch.addmv(block[line], past.t(), past.select(1, pick), alpha=-1)

    def _multiply(self, pick: int, key: Tensor, t: int) -> None:
        if len(self.blocks) == self.most:
            old = self.blocks.popleft()
            for row in old[1]:
                if row in self.place and self.place[row][0] is old:  # for want of others it may be in a later one too
                    del self.place[row]
                    self.held[row] = False
        ahead = key.masked_fill(self.held, GONE)
        ahead[pick] = torch.iinfo(torch.int32).max
        some = ahead.topk(self.width).indices
        lines = products(self.unit.index_select(1, some), self.unit)[0]
        if t:
            past = self.factors[:t]
            lines.addmm_(past.index_select(1, some).t(), past, alpha=-1)
        self.held[some] = True
        block = lines, some.tolist(), t
        self.blocks.append(block)
        self.place.update((row, (block, line)) for line, row in enumerate(block[1]))


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
    key = torch.empty_like(behind)
    # A round is a few small ops, so that what a call costs counts; numpy's views of single numbers cost the least.
    left_of, behind_of, key_of = left.numpy(), behind.numpy(), key.numpy()
    order: list[int] = []
    top: list[int] = []
    for t, factor in enumerate(factors.unbind()):
        keys(square, left, behind, out=key)
        pick = int(key_of.argmax())
        if (value := int(key_of[pick])) < 0:  # what is left is spanned, and stays so
            rest = behind.argsort(descending=True, stable=True)[: k - t]
            order += rest.tolist()
            top += behind[rest].tolist()
            break
        order.append(pick)
        top.append(value)
        step = torch.div(rows.row(pick, key, t), math.sqrt(left_of[pick]), out=factor)
        left.addcmul_(step, step, value=-1)
        left_of[pick] = 0.0
        behind_of[pick] = GONE
    return torch.tensor(order), gains(torch.tensor(top, dtype=torch.int32))
