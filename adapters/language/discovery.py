"""The row of a vision-language family that nobody wrote one for, by the names of a model's parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import UnsupportedModel
from .. import hosts
from ..base import child
from .refused_families import REFUSED
from .spec import VLMSpec


def discover(model: Any) -> VLMSpec:
    """The row of a family that nobody wrote one for: the standard call, found by the names of its parts.

    Most families call a text model with embeddings, a 2-D mask, positions and a cache, and nothing else.

    Args:
        model: a vision-language model of transformers.

    Raises:
        UnsupportedModel: a part is missing; the message names it.
    """
    kind = model.config.model_type
    if kind in REFUSED:
        raise UnsupportedModel(f"{type(model).__name__} cannot be compressed: {REFUSED[kind]}")
    core = "model" if isinstance(getattr(model, "model", None), nn.Module) else ""
    inner = child(model, core)
    paths = [f"{name}{below}" for name in ("language_model", "text_model") for below in ("", ".model")]
    found = [path for path in paths if _holds_layers(inner, path)]
    ids = [
        name
        for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        if isinstance(getattr(inner.config, name, None), int)
    ]
    if not found or not ids:
        missing = "a language_model or text_model with layers" if not found else "a config field image_token_id"
        raise UnsupportedModel(f"adapter 'generic-vlm' finds no {missing} in {type(model).__name__}")
    text = child(inner, found[0]).config
    rope = getattr(text, "rope_parameters", None) or {}
    mrope = "mrope_section" in rope or any("mrope_section" in r for r in rope.values() if isinstance(r, dict))
    return VLMSpec(
        core=core,
        lm=found[0],
        projector="",
        ids=tuple(ids[:2]),
        types=hosts.MODAL_TYPES if mrope else None,
        positions="mrope" if mrope else "1d",
        parts="mrope" if mrope else "runs",
        projects_late=True,
    )


def _holds_layers(inner: nn.Module, path: str) -> bool:
    try:
        return isinstance(getattr(child(inner, path), "layers", None), nn.ModuleList)
    except UnsupportedModel:
        return False
