"""One row after cuts, which tokens a cut keeps, and who sees whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """A cut that both sides can make: of every unit the `keep` share of tokens with the largest L2 norm stays.

    Attributes:
        keep: share, 0 for none; rounds half up. None merges instead: every second token joins the one before it.
        layer: the decoder layer in front of which it happens; None for the language model's input.
        scope: what one unit is: ``picture``, ``part`` (each crop or frame; separators stay) or ``sample``.
        positions: ``keep`` or ``renumber``.
    """

    keep: float | None
    layer: int | None = None
    scope: str = "picture"
    positions: str = "keep"


def chosen(tokens: Tensor, keep: float) -> tuple[Tensor, float]:
    """The tokens that stay of one unit.

    Args:
        tokens: `[N, C]`.
        keep: share.

    Returns:
        int64 `[K]` ascending, and how far the last one taken lies above the first one left out, as a share of it.
    """
    count = int(keep * len(tokens) + 0.5)
    norms, order = tokens.double().norm(dim=-1).sort(descending=True, stable=True)
    gap = float("inf") if count in (0, len(tokens)) else float(norms[count - 1] / norms[count] - 1)
    return order[:count].sort().values, gap


@dataclass(frozen=True)
class Row:
    """The tokens of a row at some depth of the language model; the tensors share their first axis, but for `positions`.

    Attributes:
        hidden: `[L, C]`.
        positions: int64 `[1 or 3, L]`.
        owner: int64 `[L]`, picture of each token, -1 for text.
        block: int64 `[L]`, tokens of equal block see each other both ways; -1 for none.
        ids: int64 `[L]`.
        size: `[L]`, tokens that each one stands for.
        part: int64 `[L]`, crop or frame of each token of a picture, -1 for separators.
        tables: what layers take besides, one `[L, ...]` for each of the first layers.
    """

    hidden: Tensor
    positions: Tensor
    owner: Tensor
    block: Tensor
    ids: Tensor
    size: Tensor
    part: Tensor
    tables: tuple[Tensor, ...] = ()

    def take(self, index: Tensor) -> Row:
        """Some of its tokens."""
        return Row(
            self.hidden[index],
            self.positions[:, index],
            self.owner[index],
            self.block[index],
            self.ids[index],
            self.size[index],
            self.part[index],
            tuple(table[index] for table in self.tables),
        )

    def __len__(self) -> int:
        return len(self.hidden)


def causal(length: int) -> Tensor:
    """bool `[L, L]`, query by key."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def within(length: int, window: int) -> Tensor:
    """Keys less than a window behind the query, or in front of it."""
    place = torch.arange(length)
    return place[None] > place[:, None] - window


def same_chunk(length: int, size: int) -> Tensor:
    """Keys in the query's chunk of so many tokens."""
    chunk = torch.arange(length) // size
    return chunk[None] == chunk[:, None]


def same_block(block: Tensor) -> Tensor:
    """Keys in the query's block."""
    return (block[None] == block[:, None]) & (block[None] >= 0)
