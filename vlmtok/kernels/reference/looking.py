"""Whether a definition may decide by what its tensors hold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def host_may_look(x: Tensor, any_device: bool = False) -> bool:
    """Whether the host may decide by what a tensor holds: not where torch traces or counts, or where there is no data.

    Args:
        x: what would be looked at.
        any_device: also where the host would wait for a device; else on a CPU alone.
    """
    here = x.device.type == "cpu" or (any_device and x.device.type != "meta")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, FakeTensor)
    # A dispatch mode, such as a FLOP counter, is shown the plain rounds: their ops are the same whatever the data.
    return here and not traced and not torch._C._len_torch_dispatch_stack()
