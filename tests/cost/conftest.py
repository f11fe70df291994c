"""Where the work is done by what torch counts."""

from __future__ import annotations

import pytest
import torch

import vlmtok


@pytest.fixture
def counted_paths():
    """Torch definitions, and no fused fast path that the counter does not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with vlmtok.kernels.use("torch"):
        yield
    torch.backends.mha.set_fastpath_enabled(fast)
