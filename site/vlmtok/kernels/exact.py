"""Selection maths runs in real fp32: no gradients, no autocast, no TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Context in which fp32 means fp32: no_grad, autocast off, matmuls in IEEE precision.

    Works on every device, meta included. While torch.compile traces, the matmul precision cannot be changed; there the
    ops that multiply are opaque calls, so that this context applies when they run.

    Args:
        device: where the maths runs.
    """
    restore: Callable[[], Any] | None = None
    if not torch.compiler.is_compiling():
        restore = _raise_precision()
    try:
        with torch.no_grad(), _autocast_off(device):
            yield
    finally:
        if restore is not None:
            restore()


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "meta":  # autocast does not know the device
        return nullcontext()
    # Entering autocast costs 10 us, more than many ops on a CPU: only where there is something to turn off.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _raise_precision() -> Callable[[], Any] | None:
    """Sets IEEE precision for fp32 matmuls; returns what undoes it, or None where nothing had to be done."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch.backends.*.fp32_precision, which the older getter refuses to read
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = cuda.fp32_precision, cpu.fp32_precision
        cuda.fp32_precision = cpu.fp32_precision = "ieee"

        def restore() -> None:
            cuda.fp32_precision, cpu.fp32_precision = before

        return restore
    if precision == "highest":
        return None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(precision)
