"""Choices of tokens that methods share."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top(score: Tensor, k: int) -> Tensor:
    """The k tokens of highest score, in the order in which they stand.

    Args:
        score: `[B, N]`, any floating dtype; higher is better.
        k: how many, at most N.

    Returns:
        int64 `[B, k]`, ascending; equal scores go to the lowest index, NaN loses to everything.
    """
    score = score.float()
    score = torch.where(score.isnan(), float("-inf"), score)
    return score.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
