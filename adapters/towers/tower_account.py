"""Towers of each library as counts and widths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from ...core.model_shape import ModelShape, Part, TowerShape, Uncounted
from .. import forms
from ..account import (
    block_shapes,
    class_name,
    heads,
    is_linear,
    latent_pool,
    multihead_pool,
    path_of,
    text_shape,
    tower_shape,
    weights,
)
from ..base import AttentionPool, TowerSpec


def of_timm(adapter: Any, prefix: str = "", model: nn.Module | None = None) -> ModelShape:
    """timm's VisionTransformer and Eva.

    Args:
        adapter: of the trunk.
        prefix: path of the trunk in `model`, with a dot behind.
        model: the model around the trunk, if there is one.
    """
    trunk, spec = adapter.model, adapter.tower()
    pool = getattr(trunk, "attn_pool", None)
    skip = next((p.skip for p in spec.pools if isinstance(p, AttentionPool)), 0)
    parts = [] if pool is None else [latent_pool("pool", pool, f"{prefix}attn_pool", skip)]
    embedding = adapter.embedding()
    outside = [embedding, *spec.blocks, *([] if pool is None else [pool])]
    parts += [Part(part.name, part.row, path=prefix + part.path) for part in heads(trunk, outside)]
    stem = getattr(embedding, "proj", None)
    uncounted = []
    if hasattr(embedding, "backbone"):
        uncounted = [Uncounted("the convolutions in front of the patch embedding are not counted")]
    tower = tower_shape(model or trunk, spec, stem, parts)
    return ModelShape(class_name(model or trunk), adapter.layout(), tower, uncounted=tuple(uncounted))


def of_open_clip_tower(adapter: Any, prefix: str = "", model: nn.Module | None = None) -> ModelShape:
    """open_clip's VisionTransformer; arguments as in `of_timm`."""
    tower, spec = adapter.model, adapter.tower()
    parts = []
    pool, second = tower.attn_pool, getattr(tower, "attn_pool_contrastive", None)
    if pool is not None:
        queries = int(pool.query.shape[0])
        parts.append(multihead_pool("pool", pool.attn, queries, 0, f"{prefix}attn_pool"))
        if second is not None:
            path = f"{prefix}attn_pool_contrastive"
            part = multihead_pool("contrastive pool", second.attn, int(second.query.shape[0]), 0, path)
            if tower.attn_pool_type == "cascade":  # it pools what the first one leaves
                part = Part(part.name, part.macs(1, queries), path=path)
            parts.append(part)
    if tower.proj is not None:
        parts.append(Part("projection", tower.proj.numel()))
    shape = tower_shape(model or tower, spec, tower.conv1, parts)
    return ModelShape(class_name(model or tower), adapter.layout(), shape)


def of_open_clip_timm(adapter: Any, prefix: str = "", model: nn.Module | None = None) -> ModelShape:
    """open_clip's TimmModel: the trunk, and the head behind it."""
    outer = adapter.model
    shape = of_timm(adapter.inner, f"{prefix}trunk.", model or outer)
    assert shape.vision is not None
    head = [Part(p.name, p.row, path=f"{prefix}head.{p.path}".rstrip(".")) for p in heads(outer.head, ())]
    vision = replace(shape.vision, parts=(*shape.vision.parts, *head))
    return ModelShape(shape.name, adapter.layout(), vision, uncounted=shape.uncounted)


def of_open_clip(adapter: Any) -> ModelShape:
    """A dual encoder of open_clip."""
    model = adapter.model
    inner = of_open_clip_timm if hasattr(adapter.vision, "inner") else of_open_clip_tower
    seen = inner(adapter.vision, "visual.", model)
    text, uncounted = None, list(seen.uncounted)
    if adapter.text is not None:
        tower = getattr(model, "text", model)
        projection = getattr(tower, "text_projection", None)
        parts = []
        if projection is not None and is_linear(projection):
            parts = [Part("text projection", weights(projection), path=path_of(model, projection))]
        elif projection is not None:
            parts = [Part("text projection", projection.numel())]
        text = text_shape(model, adapter.text, int(tower.context_length), parts)
    else:
        uncounted.append(Uncounted("the text tower is not counted", _text_path(model), apart=True))
    if hasattr(model, "text_decoder"):
        uncounted.append(Uncounted("the multimodal decoder is not counted", "text_decoder", apart=True))
    return ModelShape(class_name(model), adapter.layout(), seen.vision, text, uncounted=tuple(uncounted))


def _text_path(model: Any) -> str:
    """Where the text tower is; a model without a module around it has a transformer for text alone."""
    return "text" if hasattr(model, "text") else "transformer"


def of_hf_vision(adapter: Any) -> ModelShape:
    """A vision model of transformers, alone or in a dual encoder."""
    model, tower = adapter.model, adapter.vision()
    beside = [getattr(model, name, None) for name in ("text_model", "text_projection")]
    around = [module for module in beside if module is not None]
    vision = hf_tower(model, model, adapter.tower(), tower, around)
    return ModelShape(class_name(model), adapter.layout(), vision, _hf_text(model, around))


def _hf_text(model: Any, parts: list[nn.Module]) -> TowerShape | None:
    """The text tower of a dual encoder; its blocks are those of the family's vision tower.

    Args:
        model: the dual encoder.
        parts: the text model, and the projection behind it if there is one.
    """
    from .hf_rows import ROWS, text_spec

    if not parts:
        return None
    text: Any = parts[0]
    rows = [row for row in ROWS.values() if forms.blocks_of(text, row.layer)]
    blocks = forms.blocks_of(text, rows[0].layer)
    others = [module for module in model.children() if module not in parts]
    return TowerShape(
        blocks=block_shapes(rows[0].block, blocks, int(text.config.hidden_size)),
        tokens=int(text.config.max_position_embeddings),
        protected=0 if text_spec(model) is None else 2,  # start and end of text
        parts=tuple(heads(model, [*others, *blocks])),
        first=path_of(model, blocks[0]),
    )


def hf_tower(
    model: nn.Module, top: nn.Module, spec: TowerSpec, tower: nn.Module, around: Iterable[nn.Module]
) -> TowerShape:
    """A vision tower of transformers.

    Args:
        model: where parts are looked for.
        top: the model whose paths count.
        spec: the tower as data.
        tower: the module that holds it.
        around: modules of `model` that are no part of the tower.
    """
    stem = next((m for m in tower.modules() if isinstance(m, nn.Conv2d)), None)
    pools: list[Any] = [
        m
        for m in tower.modules()
        if hasattr(m, "probe") and isinstance(getattr(m, "attention", None), nn.MultiheadAttention)
    ]
    parts = [
        multihead_pool("pool", p.attention, int(p.probe.shape[1]), weights(p) - weights(p.attention), path_of(top, p))
        for p in pools
    ]
    prefix = path_of(top, model)
    skip = [*spec.blocks, *pools, *around]
    for part in heads(model, skip):
        path = f"{prefix}.{part.path}" if prefix else part.path
        parts.append(Part(path, part.row, path=path))
    return tower_shape(top, spec, stem, parts)
