"""Which path an op takes: the torch definition or the Triton kernel."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ParameterError, VlmtokError
from .table import device_facts, policy, prefers_triton

log = logging.getLogger("vlmtok.kernels")

MODES = ("auto", "torch", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of the Triton kernels."""


class KernelError(VlmtokError, RuntimeError):
    """The Triton path was asked for and cannot take this call."""


def _checked(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ParameterError(f"{origin}: {mode!r} is not possible; one of {', '.join(MODES)}")
    return mode


_mode = _checked(os.environ.get("VLMTOK_KERNELS", "auto"), "environment variable VLMTOK_KERNELS")
# Triton reads the variable when it is imported; one process interprets or compiles, it never does both.
INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_ran: Counter[str] = Counter()
_told: set[tuple[str, str]] = set()


def mode() -> str:
    """The mode in force: ``"auto"``, ``"torch"`` or ``"triton"``."""
    return _mode


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Context that overrides the environment variable ``VLMTOK_KERNELS``, for the whole process.

    Args:
        mode: ``"torch"`` takes the plain torch definitions; ``"triton"`` the kernels, and raises `KernelError` where
            one cannot take a call; ``"auto"`` goes by the table in `vlmtok.kernels.table`, and takes torch where a
            kernel cannot run.

    Raises:
        ParameterError: no such mode.
    """
    global _mode
    before, _mode = _mode, _checked(mode, "vlmtok.kernels.use")
    try:
        yield
    finally:
        _mode = before


def ran(reset: bool = False, since: Mapping[str, int] | None = None) -> dict[str, int]:
    """Which paths ran, in eager calls, since the last reset.

    Calls inside a compiled graph are not counted (the graph holds no Python).

    Args:
        reset: start again from nothing.
        since: what an earlier call returned; only what came after it is told.

    Returns:
        ``"op:path"`` to the number of calls, for instance ``{"match_max:torch": 12}``.
    """
    seen = dict(_ran)
    if since and all(seen.get(name, 0) >= count for name, count in since.items()):  # no reset in between
        seen = {name: more for name, count in seen.items() if (more := count - since.get(name, 0))}
    if reset:
        _ran.clear()
    return seen


def choose(op: str, x: Tensor, *, batch: int, pair_bytes: int = 0, limit: str | None = None) -> bool:
    """Whether a call goes to the Triton kernel.

    Args:
        op: name of the op.
        x: one of its tensors.
        batch: rows of the batch.
        pair_bytes: bytes of N x N intermediates on the torch path.
        limit: why the kernel cannot take this call, or None.

    Returns:
        True for Triton, False for torch.

    Raises:
        KernelError: the mode is ``"triton"`` and the kernel cannot take the call.
    """
    triton = False
    if _mode != "torch":
        problem = limit or _problem(x)
        if _mode == "triton":
            if problem is not None:
                raise KernelError(
                    f"{op}: the mode is 'triton', but {problem}; VLMTOK_KERNELS=auto or torch takes the torch path"
                )
            triton = True
        elif problem is None and x.device.type == "cuda":
            triton = prefers_triton(op, batch, pair_bytes, x.device)
        if _mode == "auto" and problem is not None and not torch.compiler.is_compiling():
            _tell(op, problem)
    note(op, "triton" if triton else "torch")
    return triton


def explain(device: torch.device) -> tuple[str, str]:
    """Which path calls on a device take, and why.

    Args:
        device: where the tensors are.

    Returns:
        ``"torch"``, ``"triton"``, ``"table"`` (it depends on the call) or ``"none"`` (every call raises), and why.
    """
    if _mode == "torch":
        return "torch", "the mode is 'torch'"
    problem = _problem(torch.empty(0, device=device))
    if _mode == "triton":
        return (
            ("triton", "the mode is 'triton'") if problem is None else ("none", f"the mode is 'triton', but {problem}")
        )
    if problem is not None:
        return "torch", problem
    if device.type != "cuda":
        return "torch", "the mode 'auto' takes kernels on CUDA and HIP devices alone"
    row = policy("*", device_facts(device.index)[0])
    return "table", (
        f"triton from {row.min_batch} rows or {row.pair_bytes / 2**30:g} GiB of pairs on, torch below "
        f"({row.basis}{f' on {row.device}' if row.device else ''})"
    )


def note(op: str, path: str, times: int = 1) -> None:
    """Counts calls for `ran`; free under torch.compile."""
    if not torch.compiler.is_compiling():
        _ran[f"{op}:{path}"] += times


def _problem(x: Tensor) -> str | None:
    """Why Triton cannot run on a tensor, or None. A meta tensor has nothing to run, only shapes."""
    if not HAS_TRITON:
        return "triton is not installed"
    if x.device.type not in ("cuda", "meta") and not (x.device.type == "cpu" and INTERPRETS):
        return f"the tensor is on {x.device.type} and Triton compiles for CUDA and HIP devices"
    if x.device.type == "cuda" and torch.cuda.is_available() and not device_facts(x.device.index)[1]:
        return f"{x.device} is older than compute capability 8.0"
    if x.dtype not in DTYPES:
        return f"its dtype is {x.dtype} and the kernels take float16, bfloat16 and float32"
    return None


def _tell(op: str, problem: str) -> None:
    if (op, problem) not in _told:
        _told.add((op, problem))
        log.info("%s takes the torch path: %s", op, problem)
