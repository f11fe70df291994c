"""Choosing rows one after the other, each by what it adds to the coverage of targets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import exact
from .lazy_coverage import added, cover_in_blocks, cover_lazily, places_behind, split
from .looking import host_may_look
from .rows import blank, finite_unit_rows, square_products
from .steps import in_steps

TABLE_BYTES = 2 << 30
"""Bytes of the products of a picture that `greedy_cover_cosine` holds; beyond, it multiplies rows again."""


def greedy_cover(
    table: Tensor, k: int, *, weight: Tensor | None = None, late: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.greedy_cover`: `cover_plainly`, or on a CPU what chooses the same by less work."""
    batch, n, targets = table.shape
    with exact(table.device):
        table = table.float().contiguous()
        weight = None if weight is None else weight.float().clamp(min=0.0)
        if k == 0 or batch == 0:
            return table.new_empty(batch, k, dtype=torch.int64), table.new_empty(batch, k)
        if not host_may_look(table):
            first = added(table, table.new_zeros(batch, 1, targets), weight)
            return cover_plainly(table, k, weight, places_behind(first, late))
        chosen = []
        for some, _ in in_steps(batch, 1, n * targets, table.device.type):
            own = None if weight is None else weight[some]
            # In steps, so that what is cut off at zero stays near the processor.
            parts = [added(rows, rows.new_zeros(targets)) for rows in split(table[some].flatten(0, 1))]
            first = torch.cat(parts).view(-1, n)
            first = first if own is None else first * own
            behind = places_behind(first, None if late is None else late[some])
            chosen.append(cover_lazily(table[some], k, own, first, behind))
        return torch.cat([order for order, _ in chosen]), torch.cat([gain for _, gain in chosen])


def cover_plainly(table: Tensor, k: int, weight: Tensor | None, behind: Tensor) -> tuple[Tensor, Tensor]:
    """The rule itself: all gains in each round.

    Args:
        table: fp32 `[B, N, R]`, contiguous.
        k: how many.
        weight: fp32 `[B, N]`, not negative, or None.
        behind: fp32 `[B, N]`, what `places_behind` gives.

    Returns:
        The choice, int64 `[B, k]`, and the gains, fp32 `[B, k]`.
    """
    cover = table.new_zeros(table.shape[0], 1, table.shape[2])
    taken = torch.zeros_like(behind, dtype=torch.bool)
    order, gain = [], []
    for _ in range(k):
        score = torch.where(behind > 0, -behind, added(table, cover, weight)).masked_fill(taken, float("-inf"))
        best, pick = score.max(1)
        order.append(pick)
        gain.append(best)
        taken = taken.scatter(1, pick.unsqueeze(1), 1)
        row = table.gather(1, pick.view(-1, 1, 1).expand(-1, 1, table.shape[2]))
        cover = torch.maximum(cover, row)
    taken_at = torch.stack(gain, 1)
    return torch.stack(order, 1), taken_at.masked_fill(taken_at < 0, float("nan"))


def greedy_cover_cosine(
    x: Tensor, k: int, *, weight: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.greedy_cover_cosine`."""
    batch, n, _ = x.shape
    with exact(x.device):
        if k == 0 or batch == 0:
            return x.new_empty(batch, k, dtype=torch.int64), x.new_empty(batch, k, dtype=torch.float32)
        unit, weight, late = covering_rows(x, weight, valid)
        chosen = []
        # Pictures in steps, so that on a CPU the products of one are held.
        for part, _ in in_steps(batch, 1, n * n, x.device.type):
            own, behind = None if weight is None else weight[part], late[part]
            if 4 * n * n <= TABLE_BYTES or not host_may_look(unit, any_device=True):
                table = square_products(unit[part])
                chosen.append(greedy_cover(table, k, weight=own, late=behind))
            else:
                for i, rows in enumerate(unit[part]):
                    one = cover_in_blocks(rows, k, None if own is None else own[i], behind[i])
                    chosen.append((one[0].unsqueeze(0), one[1].unsqueeze(0)))
        return torch.cat([order for order, _ in chosen]), torch.cat([gain for _, gain in chosen])


def covering_rows(x: Tensor, weight: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows that cover each other, and which of them follow behind.

    Args:
        x: `[B, N, D]`.
        weight: `[B, N]`, or None.
        valid: bool `[B, N]`, or None.

    Returns:
        Rows of length one, fp32, those that are not finite or valid, or whose weight is NaN, zero; the weights, 0 for
        NaN; and int64 `[B, N]`: 0, for rows that are not finite 1, for invalid ones 2.
    """
    unit, finite, _ = finite_unit_rows(x)
    bad = ~finite
    if weight is not None:
        weight = weight.float().clamp(min=0.0)
        bad = bad | ~weight.isfinite()
        weight = weight.masked_fill(bad, 0.0)
    late = bad.long()
    if valid is not None:
        late = late.masked_fill(~valid, 2)
    return blank(unit, late > 0), weight, late
