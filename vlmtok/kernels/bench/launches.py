"""Launches that a piece of code makes: counted on meta tensors without a GPU, or as the profiler of a GPU saw them.

At batch 1 a merge layer costs its launches, not its bytes. `CountOps` counts dispatched ops that are neither views nor
allocations, plus the Triton launches (and torch ops) inside every opaque `vlmtok` op. Use it on the meta device under
``kernels.use("triton")``::

    with kernels.use("triton"), CountOps() as count:
        plan = kernels.bipartite_match(keys, 8, 1)
    assert count.total <= 2, count
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import library, reference

# Neither a launch nor work: allocations, views that the schema does not mark, a tensor pointed elsewhere, questions.
_FREE = re.compile(
    r"(new_)?empty|_unsafe_view|detach|lift_fresh|scalar_tensor|promote_types|sym_|is_|set_|_fused_sdp_choice"
)


@dataclass
class Launch:
    """One captured launch of a Triton kernel."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    warps: int
    stages: int
    constants: dict[str, Any]


def capture(call: Callable[[], Any]) -> list[Launch]:
    """The Triton launches that `call` makes; none of them runs."""
    from .. import triton_common

    for module in sorted(set(library.LAUNCHERS.values())):
        importlib.import_module(f"vlmtok.kernels.{module}")
    seen: list[Launch] = []

    def record(kernel: Any, programs: int, x: Any, *args: Any, warps: int, stages: int = 2, **constants: Any) -> None:
        if programs:
            seen.append(Launch(kernel, programs, args, warps, stages, constants))

    original = triton_common.launch
    found = [module for name, module in sys.modules.items() if name.startswith("vlmtok.kernels.triton_")]
    users: list[Any] = [module for module in found if hasattr(module, "launch")]
    for user in users:
        user.launch = record
    try:
        call()
    finally:
        for user in users:
            user.launch = original
    return seen


class CountOps(TorchDispatchMode):
    """Counts ops and launches.

    Attributes:
        ops: name of an op or kernel to how often it ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Launches in all."""
        return sum(self.ops.values())

    def __str__(self) -> str:
        return f"{self.total}: " + ", ".join(f"{name} x{n}" for name, n in self.ops.most_common())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Runs an op, and counts it unless it is free."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "vlmtok":
            self.ops += _inside(func, args, kwargs)
        elif not _is_free(func):
            self.ops[str(func)] += 1
        return result


def profiled(call: Callable[[], Any]) -> Counter[str]:
    """Kernels (and copies) that a call launches on the GPU, as the profiler sees them.

    Args:
        call: what runs; it has run before, so that nothing is compiled or loaded.

    Returns:
        Name to count.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return Counter({e.key: e.count for e in profile.key_averages() if e.device_type.name == "CUDA"})


def _is_free(func: Any) -> bool:
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return views or func.namespace in ("prim", "profiler") or bool(_FREE.match(func._schema.name.split("::")[1]))


def _inside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Counter[str]:
    """What an opaque op launches on the Triton path, or dispatches on the torch path."""
    name = func._schema.name.split("::")[1]
    kwargs = dict(kwargs)
    path = kwargs.pop("path", "")
    count = CountOps()
    if path == "torch" or name not in library.LAUNCHERS:
        with count:
            getattr(reference, name)(*args, **kwargs)
        return count.ops
    launcher = getattr(importlib.import_module(f"vlmtok.kernels.{library.LAUNCHERS[name]}"), name)
    meta = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))

    def run() -> None:
        with count:
            launcher(*meta[0], **meta[1])

    for launch in capture(run):
        count.ops[f"triton {launch.kernel.__name__}"] += 1
    return count.ops
