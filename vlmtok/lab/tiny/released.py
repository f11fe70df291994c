"""Tiny families as deep as released ones, with the released order of kinds of layers: what attaches depends on both.

Widths, weights and prompts are those of `families`; a family is made from its tiny configuration, its depths changed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .families import FAMILIES, TOWER_ONLY, Family
from .further_families import FURTHER, FURTHER_TOWERS

FULL, SLIDING, CHUNKED, LINEAR, CONV = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "conv",
)


@dataclass(frozen=True)
class Depths:
    """How deep a family is, and which kinds of layers follow each other.

    Attributes:
        decoder: layers of the language model.
        kinds: of its layers, from the first on, over and over.
        tower: layers of the vision tower.
        text: other settings of the language model's configuration that go with its depth.
        vision: the same of the tower's.
    """

    decoder: int = 32
    kinds: tuple[str, ...] = (FULL,)
    tower: int = 24
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layer_types(self) -> list[str]:
        """The kind of every layer of the language model."""
        return [self.kinds[layer % len(self.kinds)] for layer in range(self.decoder)]


_QWEN3 = Depths(tower=27, vision={"deepstack_visual_indexes": [8, 16, 24]})
_THREE_TO_ONE = Depths(kinds=(LINEAR,) * 3 + (FULL,), tower=27)
_WINDOWS = (SLIDING,) * 3 + (FULL,)

DEPTHS: dict[str, Depths] = {
    "qwen2_vl": Depths(tower=32),
    "qwen2_5_vl": Depths(tower=32, vision={"fullatt_block_indexes": [7, 15, 23, 31]}),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _THREE_TO_ONE,
    "qwen3_5_moe": _THREE_TO_ONE,
    "paddleocr_vl": Depths(18, tower=27),
    "gemma3": Depths(34, (SLIDING,) * 5 + (FULL,), tower=27),
    "gemma4": Depths(35, (SLIDING,) * 4 + (FULL,), tower=16, text={"num_kv_shared_layers": 20}),
    "paligemma": Depths(18, tower=27),
    "paligemma2": Depths(26, (SLIDING, FULL), tower=27),
    "llama4": Depths(
        kinds=(CHUNKED,) * 3 + (FULL,), text={"no_rope_layers": [1, 1, 1, 0] * 8, "moe_layers": [*range(32)]}
    ),
    "aya_vision": Depths(kinds=_WINDOWS, tower=27),
    "cohere2_vision": Depths(kinds=_WINDOWS, tower=27),
    "lfm2_vl": Depths(16, tuple(FULL if layer in (2, 5, 8, 10, 12, 14) else CONV for layer in range(16)), tower=26),
}
"""Families whose depths or kinds of layers are not the usual ones of `Depths`."""

_FURTHER = {family.name for family in (*FURTHER, *FURTHER_TOWERS)}
NAMES = tuple(name for name in (*FAMILIES, *TOWER_ONLY) if name not in _FURTHER)
"""Families that are made at released depth; what differs little from one of them is not."""

TOWER_GAIN = 2.0
"""At most, of `Family.tower_gain`: with 4, towers of 27 layers make 1e-3 of what fp32 rounds."""


def released(name: str) -> Family:
    """A tiny family at released depth.

    Args:
        name: one of `NAMES`.
    """
    family = {**FAMILIES, **TOWER_ONLY}[name]
    make = functools.partial(_deep, family, DEPTHS.get(name, Depths()))
    return dataclasses.replace(family, make=make, tower_gain=min(family.tower_gain, TOWER_GAIN))


def _deep(family: Family, depths: Depths) -> nn.Module:
    with torch.device("meta"):
        small: Any = family.make()
    config = copy.deepcopy(small.config)
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers = depths.decoder
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = depths.layer_types
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", depths.tower)
    for part, settings in ((text, depths.text), (vision, depths.vision)):
        for setting, value in settings.items():
            if getattr(part, setting, None) is not None:
                setattr(part, setting, value)
    made: nn.Module = type(small)(config)
    return made


@functools.cache
def shared(name: str, attention: str | None = None) -> nn.Module:
    """A model at released depth that callers of one process share; they leave it as it was.

    Args:
        name: of the family.
        attention: implementation of attention; None for the family's first.
    """
    family = released(name)
    return family.build(attention or family.attentions[0])
