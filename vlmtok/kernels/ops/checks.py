"""What the public ops ask of their arguments; each check says what was found and what is possible."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError

INTS = (torch.int64, torch.int32)
LONG = (torch.int64,)
BOOL = (torch.bool,)


def check_floating(op: str, shape: str, **tensors: Tensor | None) -> None:
    """Floating tensors of as many axes as `shape` has letters."""
    axes = shape.count(",") + 1
    for name, x in tensors.items():
        if x is not None and (x.dim() != axes or not x.is_floating_point()):
            raise ParameterError(f"{op}: {name} must be floating {shape}, got {x.dtype} {list(x.shape)}")


def check_index(op: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Tensors of one shape, of one of the dtypes."""
    for name, x in tensors.items():
        if x is not None and (tuple(x.shape) != shape or x.dtype not in dtypes):
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ParameterError(f"{op}: {name} must be {wanted} {list(shape)}, got {x.dtype} {list(x.shape)}")


def check_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Tensors on the device of the first."""
    for name, x in tensors.items():
        if x is not None and x.device != first.device:
            raise ParameterError(f"{op}: {name} is on {x.device}, the others are on {first.device}")


def check_word(op: str, name: str, value: str, words: tuple[str, ...]) -> None:
    """One of the words that are possible."""
    if value not in words:
        raise ParameterError(f"{op}: {name}={value!r} is not possible; one of {', '.join(map(repr, words))}")


def check_k(op: str, k: int, n: int) -> None:
    """How many rows are chosen: 0 to n."""
    if isinstance(k, bool) or not 0 <= k <= n:
        raise ParameterError(f"{op}: k={k!r} must be in [0, {n}], the rows there are")


def check_r(op: str, r: int, most: int) -> None:
    """How many tokens merge away: 0 to `most`."""
    if isinstance(r, bool) or not 0 <= r <= most:
        raise ParameterError(f"{op}: r={r!r} must be in [0, {most}]")
