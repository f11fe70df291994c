"""Whether a definition may decide by what its tensors hold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def host_may_look(x: Tensor) -> bool:
    """Whether the host may decide by what a tensor holds: on a CPU, where nothing traces, counts or has no data."""
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, FakeTensor)
    return x.device.type == "cpu" and not seen and not torch._C._len_torch_dispatch_stack()
