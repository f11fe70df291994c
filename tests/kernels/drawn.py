"""What the tests of definitions are given: drawn rows, and drawn plans of a merge."""

import torch

NONE = float("-inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows(batch, n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, d, generator=generator).to(dtype)


def plan(batch, n, r, seed, repeats=False):
    """A merge that is partly empty; with `repeats` tokens may occur several times."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)])
    src, keep = order[:, :r], order[:, r:]
    if repeats:
        src = torch.randint(0, n, (batch, r), generator=generator)
    return keep, src, torch.randint(-1, n - r, (batch, r), generator=generator)
