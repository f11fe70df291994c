"""What the kernels' checks are given, and how they compare: floats close, indices exactly."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NONE = float("-inf")


def rows(batch: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan(batch: int, n: int, r: int, seed: int = 0, repeats: bool = False):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)])
    src, keep = order[:, :r], order[:, r:]
    if repeats:
        src = torch.randint(0, n, (batch, r), generator=generator)
    return keep, src, torch.randint(-1, max(n - r, 1), (batch, r), generator=generator)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=1e-5, equal_nan=True)


def same(found, expected, tolerance: float = 2e-6) -> None:
    """Floats close, integers equal."""
    for a, b in zip(found, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            close(a, b, tolerance)
        else:
            assert torch.equal(a, b), (a, b)
