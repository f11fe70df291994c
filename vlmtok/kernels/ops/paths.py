"""Which way a call can go, and the way it goes: the definition, or an opaque op that runs it or the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import library, reference
from ..table import LIMIT_GREEDY


def opaque() -> bool:
    """Whether the torch path must be one node too.

    Under torch.compile an op that multiplies stays opaque on every path: the precision of its matmuls can only be set
    when it runs, and the greedy loop would unroll. So does a merge where compiled sums would have no order. An exported
    program takes plain torch.
    """
    return torch.compiler.is_compiling() and not _exporting()


def _exporting() -> bool:
    """As `torch.compiler.is_exporting`, which Dynamo of torch 2.9 takes to be true in whatever it compiles."""
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def _detached(args: tuple[Any, ...]) -> list[Any]:
    """Tensors without their history; one that is given twice stays one."""
    made: list[Any] = []
    for x in args:
        own = x.detach() if isinstance(x, Tensor) else x
        for earlier, done in zip(args, made):
            if earlier is x:  # Dynamo of torch 2.9 knows no id() of a tensor
                own = done
        made.append(own)
    return made


def run_detached(op: str, triton: bool, *args: Any, **kwargs: Any) -> Any:
    """Runs an op whose outputs carry no gradient."""
    if triton or opaque():
        with torch.no_grad():
            return library.call(op, *_detached(args), path="triton" if triton else "torch", **kwargs)
    return getattr(reference, op)(*args, **kwargs)


def too_wide(*tensors: Tensor) -> str | None:
    """Why a kernel cannot take these dtypes together, or None."""
    if any(x.dtype == torch.float64 for x in tensors):
        return "one dtype is torch.float64 and the kernels take float16, bfloat16 and float32"
    return None


def too_many(n: int) -> str | None:
    """Why a kernel that chooses rows one after the other cannot take so many, or None."""
    return f"{n} rows exceed {LIMIT_GREEDY}, what the kernels are tiled for" if n > LIMIT_GREEDY else None


def square_bytes(x: Tensor) -> int:
    """Bytes of all similarities of the rows `[B, N, D]` with each other, in fp32."""
    return 4 * x.shape[0] * x.shape[1] * x.shape[1]
