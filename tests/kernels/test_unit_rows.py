"""What every definition stands on: length, taking rows, and real fp32 whatever the model's precision."""

import pytest
import torch
from drawn import rows

from vlmtok import kernels


def test_unit_rows_that_overflow_are_nan():
    x = torch.tensor([[3e30, 4e30], [3.0, 4.0], [0.0, 0.0], [float("inf"), 1.0]])
    unit = kernels.unit_rows(x)
    assert unit[0].isnan().all() and unit[3].isnan().all()
    torch.testing.assert_close(unit[1:3], torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_take_rows_is_gather():
    x, index = rows(3, 7, 4), torch.randint(0, 7, (3, 5))
    expected = x.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    assert torch.equal(kernels.take_rows(x, index), expected)
    assert torch.equal(kernels.take_rows(x[:1, 1:], index[:1].clamp(max=5)), x[:1, 1:][:, index[0].clamp(max=5)])


@pytest.mark.parametrize("lower", ["legacy", "backend", "autocast"])
def test_selection_is_exact_whatever_the_precision(lower):
    """TF32, bf16 matmuls and autocast are the model's business, and are put back."""
    x = rows(1, 64, 64)
    value, index = kernels.match_max(x, x, exclude_diag=True)
    matmul = torch.backends.mkldnn.matmul
    try:
        if lower == "legacy":
            torch.set_float32_matmul_precision("medium")
        elif lower == "backend":
            matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower == "autocast"), kernels.exact(x.device):
            assert not torch.is_autocast_enabled("cpu")
            assert matmul.fp32_precision in ("ieee", "none")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower == "autocast"):
            found, picked = kernels.match_max(x, x, exclude_diag=True)
        assert matmul.fp32_precision == {"legacy": "bf16", "backend": "bf16"}.get(lower, matmul.fp32_precision)
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, value) and torch.equal(picked, index)
