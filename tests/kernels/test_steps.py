"""Definitions hold one step of all similarities, and the steps change nothing."""

import pytest
import torch
from drawn import rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmtok.kernels import reference
from vlmtok.kernels.reference import steps


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an op returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x._is_view():
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


@pytest.mark.parametrize("batch, n", [(1, 4096), (64, 512)])
def test_memory_does_not_grow_with_the_square(batch, n):
    """All similarities together would take 64 MiB; the definitions hold one step of them."""
    x = torch.randn(batch, n, 4)
    q = x.reshape(batch, 1, n, 4)
    calls = {
        "match": lambda: reference.match_max(x, x, exclude_diag=True),
        "energy": lambda: reference.energy(x, margin=0.3),
        "paper energy": lambda: reference.energy(x, margin=0.3, kind="paper"),
        "energy match": lambda: reference.energy_match(x, n // 4, margin=0.3),
        "complete match": lambda: reference.complete_match(x, x[..., 0], n // 4),
        "received attention": lambda: reference.received_attention(q, q, scale=0.5),
    }
    for name, call in calls.items():
        with Largest() as largest:
            call()
        most = batch * 256 * n * 4 if name == "received attention" else steps.STEP_BYTES["cpu"]
        assert largest.bytes <= most, f"{name}: {largest.bytes:,} bytes"


@pytest.mark.parametrize("room", [4, 500, 3000, 1 << 20])
def test_steps_change_nothing(room, monkeypatch):
    """Rows and pictures of any number, masks and the diagonal among them."""
    a, b = rows(3, 13, 8, seed=1), rows(3, 17, 8, seed=2)
    rank_a, rank_b = torch.randperm(39).view(3, 13) % 5, torch.randperm(51).view(3, 17) % 5
    valid = torch.rand(3, 17) > 0.3
    q = torch.randn(2, 2, 9, 4)

    def everything():
        return [
            *reference.match_max(a, b),
            *reference.match_max(b, b, exclude_diag=True, valid_b=valid),
            *reference.match_max(a, b, rank_a=rank_a, rank_b=rank_b, valid_b=valid),
            *(reference.energy(b, margin=0.3, kind=kind) for kind in ("elu", "paper", "gaussian")),
            reference.received_attention(q, q, scale=0.5, bias=torch.arange(162.0).view(2, 1, 9, 9) / 40),
        ]

    monkeypatch.setattr(steps, "STEP_BYTES", {"cpu": 1 << 40})
    expected = everything()
    monkeypatch.setattr(steps, "STEP_BYTES", {"cpu": room})
    monkeypatch.setattr(steps, "STEP_BYTES_ELSEWHERE", room)
    for found, wanted in zip(everything(), expected):
        torch.testing.assert_close(found, wanted)
