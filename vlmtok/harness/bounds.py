"""Bounds on the pixels of a picture, where a processor has such: Qwen-VL and its kin."""

from __future__ import annotations

from typing import Any

from ..errors import ParameterError
from .arguments import PIXELS, Arguments

EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""What such processors call their bounds; others mean sides by these names,"""
LONGEST_SIDE = 4096
"""and none is longer."""


def bounded(asked: Arguments, processor: Any) -> dict[str, int]:
    """What the processor takes as the size of pictures.

    Args:
        asked: the bounds; what is None stays as the processor has it.
        processor: of transformers.

    Returns:
        Its size, or nothing where no bound is asked.

    Raises:
        ParameterError: it has none, or they exclude each other.
    """
    given = {name: getattr(asked, name) for name in PIXELS if getattr(asked, name) is not None}
    if not given:
        return {}
    pictures = processor.image_processor
    size = pictures.size if isinstance(pictures.size, dict) else vars(pictures.size)
    edges = {edge: int(size.get(edge) or 0) for edge in EDGES.values()}
    if not min(edges.values()) or max(edges.values()) <= LONGEST_SIDE:
        kind = type(pictures).__name__
        raise ParameterError(f"model_args: {' and '.join(given)} cannot be set: {kind} has no bounds on pixels")
    edges.update({EDGES[name]: value for name, value in given.items()})
    if edges["shortest_edge"] > edges["longest_edge"]:
        raise ParameterError(f"model_args: min_pixels={edges['shortest_edge']} is above {edges['longest_edge']}")
    return edges
