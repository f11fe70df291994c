"""Launches of a vision tower at batch 1, where they are what it costs: as the profiler saw them, or counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ... import kernels
from ...compression import compress
from ...kernels.bench.launches import CountOps, profiled
from ...kernels.bench.measuring import MEASURED
from ...kernels.dispatch import HAS_TRITON
from ...timing import Progress, environment, tell
from ..suite_models import Row, Sizes, draw, tower_config

COUNTED = "counted on meta tensors, attention as one launch"


def tower_launches(sizes: Sizes, device: torch.device | None, progress: Progress | None = None) -> list[Row]:
    """What a forward of the suite's tower launches, bare and with each method for towers.

    Args:
        sizes: shapes.
        device: a GPU is profiled; on anything else, the Triton path is counted on meta tensors.
        progress: told after each method.

    Returns:
        A row a method: launches of one picture in bf16, bare and compressed, and what a layer adds on average; one
        row that says why where there is neither a GPU nor triton.
    """
    gpu = device is not None and device.type == "cuda"
    if not gpu and not HAS_TRITON:
        return [{"model": "tower", "status": "not counted: triton, whose launches are counted, is not installed"}]
    place = device if gpu and device is not None else torch.device("meta")
    model = draw(tower_config(sizes), place, torch.bfloat16)
    depth, side = sizes.tower[1], sizes.tower[4]
    pixels = torch.zeros(1, 3, side, side, device=place, dtype=torch.bfloat16)
    launched = _profiled if gpu else _counted
    where = environment(place) if gpu else environment() | {"device": None, "device_type": "meta"}  # no machine's
    rows = []
    with torch.inference_mode(gpu), torch.no_grad():
        bare = launched(lambda: model(pixels))
        for number, method in enumerate(sizes.towers):
            with compress(model, method):
                short = launched(lambda: model(pixels))
            head = {"model": "tower", "method": method, "layers": depth, "batch": 1, "dtype": "bfloat16"}
            counts = {"launches_bare": bare, "launches": short, "added_a_layer": (short - bare) / depth}
            rows.append({**head, **counts, "status": MEASURED if gpu else COUNTED, **where})
            tell(progress, "counting launches", number + 1, len(sizes.towers))
    return rows


def _profiled(call: Callable[[], Any]) -> int:
    for _ in range(3):
        call()
    return sum(profiled(call).values())


def _counted(call: Callable[[], Any]) -> int:
    attention = _OneLaunch()
    with kernels.use("triton"), attention, CountOps() as count:
        call()
    return count.total + attention.calls


class _OneLaunch(TorchFunctionMode):
    """Counts each call of SDPA as one: on a GPU it is a kernel, on the meta device torch would write it out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Runs any other function."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls += 1
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
