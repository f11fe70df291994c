"""From patches to tokens: which patches of a tower's row each token of the language model shows, as rules by name."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Grid = tuple[int, int]


def _raster(value: Tensor, grid: Grid, tokens: int) -> Tensor:
    """Tokens are squares of patches, both row by row: `[B, N, c]` to their means `[B, n, c]`."""
    rows, columns = grid
    side = math.isqrt(rows * columns // tokens)
    squares = value.unflatten(1, (rows // side, side, columns // side, side))
    return squares.mean((2, 4)).flatten(1, 2)


RULES: dict[str, Callable[[Tensor, Grid, int], Tensor]] = {"raster": _raster}
"""By `VLMSpec.patches`: from signals of patches, their rows and columns, and how many tokens a row becomes."""


def fits(grid: Grid, tokens: int) -> bool:
    """Whether squares of one size share a grid of patches among so many tokens."""
    rows, columns = grid
    side = math.isqrt(rows * columns // tokens) if tokens else 0
    return bool(side) and not rows % side and not columns % side and side * side * tokens == rows * columns


def token_means(rule: str, value: Tensor, axis: int, grid: Grid, tokens: int) -> Tensor:
    """A signal of a tower's rows at the tokens that they become.

    Args:
        rule: a key of `RULES`.
        value: `[B, ...]` with N patches along `axis`.
        axis: of the patches.
        grid: rows and columns of the patches.
        tokens: of each row, for which `fits` holds.

    Returns:
        `[B, n, ...]`, means over the patches of each token, in the dtype of `value`; tokens come behind the batch.
    """
    moved = value.movedim(axis, 1)
    means = RULES[rule](moved.flatten(2) if moved.dim() > 2 else moved.unsqueeze(-1), grid, tokens)
    return means.unflatten(-1, moved.shape[2:]) if moved.dim() > 2 else means.squeeze(-1)
