"""Where a spec comes from, and what travels with each picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SPEC = "vlmtok"
"""The setting: a spec, or "none"."""
TEXT = "vlmtok_text"
"""Ids of the prompt behind each picture, for plans that read them; vLLM makes them part of a picture's identity."""
OURS = (SPEC, TEXT)
"""Options that no processor of transformers must see."""

IDS, TYPES, STAYS, PLACEHOLDERS = "ids", "types", "stays", "placeholders"


def spec_of(options: Mapping[str, Any], config: Any) -> str | None:
    """The spec in force.

    Args:
        options: of the request, over those of the engine.
        config: of the model, where ``hf_overrides`` puts the engine's setting.

    Returns:
        The spec as it was written, or None where nothing is to act.

    Raises:
        ValueError: it is no text.
    """
    found = options.get(SPEC, getattr(config, SPEC, None))
    if found is None:
        return None
    if not isinstance(found, str):
        raise ValueError(f"vlmtok: the setting must be a spec such as 'divprune:keep=64', or 'none', got {found!r}")
    found = found.strip()
    return None if found.lower() in ("", "none") else found


def foreign(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without ours."""
    return {name: value for name, value in options.items() if name not in OURS}


def as_bytes(text: str) -> Tensor:
    """Text as uint8 `[n]`: only tensors travel to the engine."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def as_text(data: Tensor) -> str:
    """Text from uint8 `[n]`."""
    return bytes(data.tolist()).decode()


def field(modality: str, name: str) -> str:
    """What vLLM calls something of a picture or clip; pictures and clips of a prompt may have the same inputs."""
    return f"{modality}/{name}"
