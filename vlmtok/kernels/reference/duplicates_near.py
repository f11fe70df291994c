"""The removal of near duplicates on a CPU: who is nearest is looked up among a row's nearest few.

The rows that a row is compared with change from round to round, its cosines do not. So the nearest rows of each are
found once, and again when half of the list has left; a round looks for the first of them that it compares with. Only a
row none of whose nearest is asked for is compared with all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import SMALL, products, square_products
from .steps import in_steps

NEAREST = 16
"""Rows that are remembered of each."""

TABLE_BYTES = 256 << 20
"""Bytes of cosines of a list that are kept; those of a longer one (N = 8,192) are multiplied again where needed."""


class _Near:
    """The rows of a list, by their places in it, and who is nearest to whom."""

    def __init__(self, unit: Tensor, table: Tensor | None) -> None:
        n = len(unit)
        self.unit, self.table = unit, table
        if table is None and 4 * n * n <= TABLE_BYTES:
            self.table = square_products(unit.unsqueeze(0))[0]
        value, index = [], []
        for _, rows in in_steps(1, n, n, "cpu"):
            place = torch.arange(rows.start, rows.stop)
            # A row is never compared with itself, which would take the first place.
            cosine = self.cosines(place)
            cosine.diagonal(rows.start).fill_(float("-inf"))
            best = cosine.topk(min(NEAREST, n), dim=1)
            value.append(best.values)
            index.append(best.indices)
        self.value, self.index = torch.cat(value), torch.cat(index)

    def cosines(self, places: Tensor) -> Tensor:
        """Of some rows with all."""
        if self.table is not None:
            return self.table.index_select(0, places)
        # Of fewer rows than `products` multiplies as it does many, another sum would come out.
        some = self.unit.index_select(0, places)
        filled = some if len(some) >= SMALL else torch.cat([some, some.new_zeros(SMALL - len(some), some.shape[1])])
        return products(filled.unsqueeze(0), self.unit.unsqueeze(0))[0][: len(some)]

    def nearest(self, first: Tensor, second: Tensor) -> Tensor:
        """The greatest cosine of each place of `first` with the places of `second`."""
        asked = torch.zeros(len(self.unit), dtype=torch.bool)
        asked[second] = True
        near = self.index.index_select(0, first)
        hit = asked[near]
        value = self.value.index_select(0, first).masked_fill_(~hit, float("-inf")).amax(1)
        if len(missed := (~hit.any(1)).nonzero().flatten()):
            value[missed] = self.cosines(first[missed]).index_select(1, second).amax(1)
        return value

    def cut(self, places: Tensor) -> _Near:
        """The same for a shorter list."""
        table = None if self.table is None else self.table.index_select(0, places).index_select(1, places)
        return _Near(self.unit.index_select(0, places), table)


def drop_by_neighbours(unit: Tensor, order: Tensor, k: int, step: int) -> Tensor:
    """The removal for one picture.

    Args:
        unit: fp32 `[N, D]`, rows of length one or zero, on a CPU.
        order: int64 `[M]`, the list to begin with.
        k: how many stay, at least 1.
        step: how many leave in a round.

    Returns:
        int64 `[k]`.
    """
    if len(order) <= k:
        return order
    near = _Near(unit.index_select(0, order), None)
    places = torch.arange(len(order))
    while (left := len(places)) > k:
        if 2 * left <= len(near.unit):
            near, order, places = near.cut(places), order[places], torch.arange(left)
        first, second = places[0::2], places[1::2]
        leave = min(step, left - k, len(first))
        stays = near.nearest(first, second).argsort(descending=True, stable=True)[leave:]
        places = torch.cat([first[stays], second])
    return order[places]
