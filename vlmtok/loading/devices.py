"""Devices and dtypes by name."""

from __future__ import annotations

import torch

from .problems import LoadError, line_of

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name.

    Args:
        name: ``auto`` (CUDA where there is one, else CPU), or a torch device.

    Raises:
        LoadError: torch knows no such device, or this machine has none.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise LoadError(f"device {name!r} cannot be used here: {line_of(problem)}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name.

    Args:
        name: one of `DTYPES`; ``auto`` is float32 on CPU and bfloat16 elsewhere.
        device: where the model will be.

    Raises:
        LoadError: none of them.
    """
    import torch

    if name not in DTYPES:
        raise LoadError(f"dtype {name!r} is not possible; one of {', '.join(DTYPES)}")
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
