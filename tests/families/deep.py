"""Tiny models of families whose decoder layers differ, with the pattern of layers of a release."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .build import FAMILIES


def _qwen3_5(text: Any, depth: int) -> None:
    """Three layers of linear attention, one with keys."""
    text.layer_types = (["linear_attention"] * 3 + ["full_attention"]) * (depth // 4)


def _lfm2(text: Any, depth: int) -> None:
    """LFM2-1.2B."""
    text.layer_types = ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(depth)]


def _llama4(text: Any, depth: int) -> None:
    """Every fourth layer is without positions and sees all; experts in every layer, as in Scout."""
    text.no_rope_layers = [1, 1, 1, 0] * (depth // 4)
    text.layer_types = (["chunked_attention"] * 3 + ["full_attention"]) * (depth // 4)
    text.moe_layers = list(range(depth))


def _gemma4(text: Any, depth: int) -> None:
    """Gemma 4 E2B: four windows, one full layer; all behind the first fifteen share keys."""
    text.num_kv_shared_layers = depth - 15
    text.layer_types = (["sliding_attention"] * 4 + ["full_attention"]) * (depth // 5)


PATTERNS: dict[str, Callable[[Any, int], None]] = {
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
    "lfm2_vl": _lfm2,
    "llama4": _llama4,
    "gemma4": _gemma4,
}
RELEASED = {"qwen3_5": 32, "qwen3_5_moe": 40, "lfm2_vl": 16, "llama4": 48, "gemma4": 35}
"""Layers of a release; its pattern begins alike in fewer."""


def _made(name: str, depth: int) -> nn.Module:
    model: Any = FAMILIES[name].make()
    text = model.config.get_text_config()
    text.num_hidden_layers = depth
    PATTERNS[name](text, depth)
    made: nn.Module = type(model)(model.config)
    return made


@functools.cache
def deep(name: str, depth: int, attention: str = "sdpa") -> nn.Module:
    """A model with so many layers of a release's pattern; tests of one process share it."""
    return dataclasses.replace(FAMILIES[name], make=functools.partial(_made, name, depth)).build(attention)


@functools.cache
def released(name: str) -> nn.Module:
    """A model of a release's depth, without data."""
    with torch.device("meta"):
        return _made(name, RELEASED[name])
