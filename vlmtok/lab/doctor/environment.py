"""What this machine has: versions, device, and which path the kernels take."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from ... import timing
from ...kernels import dispatch

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "timm",
    "open_clip_torch",
    "numpy",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "pillow",
    "typer",
    "rich",
)
"""Distributions whose versions an issue report needs."""


def versions() -> dict[str, str | None]:
    """Version of Python, vlmtok and every package; None where it is not installed. Nothing is imported for it."""
    from ...version import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "vlmtok": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """A device as `vlmtok.timing` names it, and the system."""
    found = timing.environment(device)
    names = ("device", "device_type", "driver", "cuda", "threads", "cores")
    return {**{name: found[name] for name in names}, "system": f"{platform.system()} {platform.machine()}"}


def kernels(device: torch.device) -> dict[str, str]:
    """The mode of `vlmtok.kernels`, the path that calls on a device take, and why."""
    path, why = dispatch.explain(device)
    return {"mode": dispatch.mode(), "path": path, "why": why}
