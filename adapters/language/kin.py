"""Rows of vision-language families that several families share, or differ from in a field or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import hosts
from .spec import VLMSpec


def shuffled(field: str, shrinks: bool = False) -> Callable[[Any], int]:
    """Patches that a pixel shuffle joins, by the field with their number along a side, or with what is left of one."""
    return lambda config: round((1 / getattr(config, field) if shrinks else getattr(config, field)) ** 2)


BOTH = ("image_token_id", "video_token_id")
QWEN = VLMSpec(
    tower="visual",
    projector="visual.merger",
    ids=BOTH,
    types=hosts.MODAL_TYPES,
    positions="mrope",
    feature=None,
    parts="mrope",
    grid_arguments=(hosts.IMAGE_GRIDS, hosts.CLIP_GRIDS),
    tower_cut="spread",
    patches="squares",
)
UNREAD: dict[str, Any] = {
    "tower_cut": None,
    "patches": None,
    "whole": "all pictures share one row, in blocks of a kind that no hook point is known for",
}
"""What differs where nobody wrote a row for the blocks of a tower that packs pictures."""
QWEN3 = replace(QWEN, deepstack=(hosts.DEEPSTACK_COLUMNS, hosts.DEEPSTACK_FEATURES))
SMOLVLM = VLMSpec(
    lm="text_model",
    tower="vision_model",
    projector="connector",
    feature=None,
    lengths_of="crops",
    parts="runs",
    thumbnail="last",
    tower_cut="spread",
    patches="raster",
    joins=shuffled("scale_factor"),
)
BLIP = VLMSpec(
    core="",
    tower="vision_model",
    projector="",
    feature=None,
    tower_cut="free",
    boundary="generate() hands its language model embeddings without ids, so nothing tells pictures from text",
)
