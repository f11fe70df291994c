"""From patches to tokens: which patches of a tower's row each token of the language model shows, as rules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grid = tuple[int, int]


def _raster(value: Tensor, grid: Grid, tokens: int) -> Tensor:
    """Tokens are squares of patches, both row by row: `[B, N, c]` to their means `[B, n, c]`."""
    rows, columns = grid
    side = math.isqrt(rows * columns // tokens)
    squares = value.unflatten(1, (rows // side, side, columns // side, side))
    return squares.mean((2, 4)).flatten(1, 2)


def _squares(value: Tensor, grid: Grid, tokens: int) -> Tensor:
    """Patches of a token stand side by side: `[B, N, c]` to `[B, n, c]`."""
    return value.unflatten(1, (tokens, -1)).mean(2)


RULES: dict[str, Callable[[Tensor, Grid, int], Tensor]] = {
    "raster": _raster,
    "squares": _squares,
    "places": _squares,  # put in order by their places before
}
"""By `VLMSpec.patches`: from signals of patches, their rows and columns, and how many tokens a row becomes."""


def fits(grid: Grid, tokens: int) -> bool:
    """Whether squares of one size share a grid of patches among so many tokens."""
    rows, columns = grid
    side = math.isqrt(rows * columns // tokens) if tokens else 0
    return bool(side) and not rows % side and not columns % side and side * side * tokens == rows * columns


def packed_means(
    rule: str,
    value: Tensor,
    axis: int,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
    order: Tensor | None,
    real: Tensor | None = None,
) -> Tensor:
    """A signal of a row of several pictures at the tokens that they become, picture by picture.

    Args:
        rule: a key of `RULES`.
        value: `[1, ...]` with the patches of all pictures along `axis`.
        axis: of the patches.
        grids: frames, rows and columns of patches of each picture.
        merge: patches along the side of a token.
        order: int64 `[T]`, which token each unit of patches in the row becomes; None where they lie in order.
        real: int64 `[patches]`, places of the patches among padding and class tokens; None where there are none.

    Returns:
        `[T, ...]`, means over the patches of each token, in the order of the placeholders.
    """
    rows = value.movedim(axis, 1)[0]
    rows = rows if real is None else rows[real]
    cell, at, found = merge * merge, 0, []
    for frames, down, across in grids:
        n = down * across
        part = rows[at : at + frames * n].unflatten(0, (frames, n))
        found.append(token_means(rule, part, 1, (down, across), n // cell).flatten(0, 1))
        at += frames * n
    tokens = torch.cat(found)
    return tokens if order is None else in_order(tokens, order)


def in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens `[T, ...]` of windows in the order of the placeholders: token i of the row is token `order[i]`."""
    return tokens[order.argsort()]


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
