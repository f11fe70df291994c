"""Floors on an H200 from its stated rates, where there is nothing to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .floors import H200, Case
from .measuring import size_of

NOT_MEASURED = "modelled, not measured"


def modelled(chosen: Sequence[Case], dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Floors on an H200, where there is nothing to measure on.

    Args:
        chosen: the cases.
        dtype: of the inputs.

    Returns:
        One row a case.
    """
    return [
        {
            **size_of(case, dtype), "status": NOT_MEASURED, "device": "H200 (stated rates)", "driver": None,
            "floor_us": round(1e6 * case.floor(H200), 2), "bytes": case.bytes, "flops": case.flops,
            "launches": case.launches, "dependent_steps": case.chain[0],
            "bound": _bound(case), "copy_bytes_per_s": H200.copy, "flops_per_s": H200.product, "launch_s": H200.launch,
        }
        for case in chosen
    ]  # fmt: skip


def _bound(case: Case) -> str:
    """What sets the floor."""
    parts = {
        "memory": replace(case, flops=0, launches=0, chain=(0, 0)),
        "products": replace(case, bytes=0, launches=0, chain=(0, 0)),
        "launches": replace(case, bytes=0, flops=0, chain=(0, 0)),
        "dependent steps": replace(case, bytes=0, flops=0, launches=0),
    }
    return max(parts, key=lambda name: parts[name].floor(H200))
