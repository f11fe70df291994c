"""What the cases of all ops draw."""

from __future__ import annotations

import torch
from torch import Tensor


def features(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Rows, keys or queries, from the normal distribution."""
    return torch.randn(*shape, device=device, dtype=dtype)


def shares(device: torch.device, *shape: int) -> Tensor:
    """fp32 scores, weights or a table, between 0 and 1."""
    return torch.rand(*shape, device=device, dtype=torch.float32)


def orders(device: torch.device, batch: int, n: int) -> Tensor:
    """The places of n rows in another order for each picture, int64 `[B, N]`."""
    return shares(device, batch, n).argsort(dim=1)
