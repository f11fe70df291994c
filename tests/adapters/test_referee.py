"""The referee of counts, and the package's own counter beside it, on operators whose cost is known by hand."""

from __future__ import annotations

import re

import pytest
import torch
from support import referee
from support.places import ROOT, TESTS
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmtok.cost.counting import MacCounter


def rows(*shape, device="cpu"):
    return torch.randn(*shape, device=device)


def attention(heads=4, kv=4, device="cpu", dtype=torch.float32, **more):
    q, k, v = (rows(2, h, n, 16, device=device).to(dtype) for h, n in ((heads, 10), (kv, 14), (kv, 14)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv, **more)


ATTENTION = 2 * 4 * 10 * 14 * (16 + 16)
CASES = {
    "fused": (attention, ATTENTION),
    "fused, causal": (lambda **on: attention(is_causal=True, **on), ATTENTION),
    "fused, a mask": (lambda device: attention(attn_mask=rows(2, 1, 10, 14, device=device), device=device), ATTENTION),
    "fused, grouped heads": (lambda **on: attention(kv=2, **on), ATTENTION),
    "fused, half": (lambda **on: attention(dtype=torch.bfloat16, **on), ATTENTION),
    "linear": (lambda device: F.linear(rows(3, 5, 8, device=device), rows(7, 8, device=device)), 3 * 5 * 7 * 8),
    "linear, biased": (
        lambda device: torch.nn.Linear(8, 7, device=device)(rows(3, 5, 8, device=device)),
        3 * 5 * 7 * 8,
    ),
    "batched": (lambda device: rows(3, 5, 8, device=device) @ rows(3, 8, 7, device=device), 3 * 5 * 7 * 8),
    "einsum": (
        lambda device: torch.einsum("bnd,bmd->bnm", rows(3, 5, 8, device=device), rows(3, 7, 8, device=device)),
        3 * 5 * 7 * 8,
    ),
    "convolution": (
        lambda device: F.conv2d(rows(2, 6, 9, 9, device=device), rows(4, 3, 3, 3, device=device), stride=3, groups=2),
        2 * 4 * 3 * 3 * 3 * 9,
    ),
    "transposed": (
        lambda device: F.conv_transpose2d(rows(2, 6, 5, 5, device=device), rows(6, 4, 3, 3, device=device)),
        2 * 6 * 25 * 4 * 9,
    ),
    "nothing": (lambda device: rows(3, 5, device=device).softmax(-1), 0),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", CASES)
def test_both_counters_give_what_is_known_by_hand(case, device):
    run, macs = CASES[case]
    with referee.counter() as flops:
        run(device=device)
    assert flops.get_total_flops() == 2 * macs
    for context in (torch.no_grad, torch.inference_mode):
        with context(), MacCounter() as counted:
            run(device=device)
        assert counted.macs == macs


def test_the_math_backend_counts_the_same():
    """What documents advise a user whose torch leaves fused attention out."""
    with sdpa_kernel(SDPBackend.MATH), referee.counter() as flops:
        attention()
    assert flops.get_total_flops() == 2 * ATTENTION


def test_the_check_of_the_documents_holds():
    """The block of docs/counting.md."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "counting.md").read_text(), re.S)[1]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        exec(compile(code, "docs/counting.md", "exec"), {})
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_every_test_that_counts_asks_the_referee():
    """`test_library.py` starts a process that counts ops of `vlmtok.kernels` alone; `test_torch_counter.py` asks
    what the counter itself sees of attention."""
    name = "Flop" + "CounterMode"
    found = {
        str(file.relative_to(TESTS)) for file in TESTS.rglob("*.py") if re.search(rf"\b{name}\(", file.read_text())
    }
    assert found == {"support/referee.py", "kernels/test_library.py", "cost/test_torch_counter.py"}
