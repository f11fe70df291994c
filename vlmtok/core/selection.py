"""Choices of tokens that methods share: the best by a score, those that cover most, and a seeded draw."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..kernels.tracing import constant_in_graphs


def ranked(score: Tensor) -> Tensor:
    """Tokens by falling score.

    Args:
        score: `[B, N]`, any floating dtype; higher is better.

    Returns:
        int64 `[B, N]`; equal scores go to the lowest index, NaN loses to everything.
    """
    score = score.float()
    return torch.where(score.isnan(), float("-inf"), score).argsort(dim=1, descending=True, stable=True)


def keep_top(score: Tensor, k: int) -> Tensor:
    """The k tokens of highest score, in the order in which they stand.

    Args:
        score: `[B, N]`, any floating dtype; higher is better.
        k: how many, at most N.

    Returns:
        int64 `[B, k]`, ascending; equal scores go to the lowest index, NaN loses to everything.
    """
    return ranked(score)[:, :k].sort(dim=1).values


def chosen_first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a choice as slots: those that stay in the order in which they stand, then the others.

    Args:
        chosen: bool `[B, N]`; rows may keep different numbers.

    Returns:
        int64 `[B, N]`, all tokens, and bool `[B, N]`, which of them stay.
    """
    n = chosen.shape[1]
    place = torch.arange(n, device=chosen.device)
    slots = torch.where(chosen, place, n + place).sort(dim=1).values
    return slots % n, slots < n


@constant_in_graphs
def random_order(n: int, seed: int, salt: str = "") -> Tensor:
    """n places in an order drawn at random.

    Args:
        n: places.
        seed: with `salt` and n it fixes the draw on every machine.
        salt: tells draws with the same seed apart.

    Returns:
        int64 `[n]`.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{salt}/{n}".encode()).digest()[:7], "little")
    return torch.randperm(n, generator=torch.Generator().manual_seed(key))


def random_subset(n: int, k: int, seed: int, salt: str = "") -> Tensor:
    """The first k, at most n, of `random_order`: int64 `[k]`, ascending."""
    return random_order(n, seed, salt)[:k].sort().values
