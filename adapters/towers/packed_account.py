"""Towers that take pictures of any size as counts and widths; what a pass costs is in `vlmtok.cost.packed`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ...core.model_shape import PackedTowerShape, Part
from ...errors import UnsupportedModel
from .. import forms
from ..account import block_shape, linear_maps, multihead_pool, path_of, weights
from ..base import child
from .packed_rows import PACKED_ROWS, PackedRow


def packed_tower(model: Any, tower: Any, whole: Any, around: Iterable[nn.Module] = ()) -> PackedTowerShape | None:
    """A tower by its row.

    Args:
        model: the model whose paths count.
        tower: the module that holds it.
        whole: configuration of the model around it.
        around: modules that count apart, such as a projector inside it.

    Returns:
        Its shape; None where no row is for its kind.

    Raises:
        UnsupportedModel: it is of a kind with a row, and its parts are not those of the row.
    """
    config = getattr(tower.config, "vision_config", tower.config)
    row = PACKED_ROWS.get(config.model_type)
    if row is None:
        return None
    blocks = forms.known_blocks(tower, row.layer)
    merge = row.merge(config, whole)
    width, heads = int(getattr(config, row.width)), int(getattr(config, row.heads))
    shapes = []
    for block in blocks:
        attn, mlp = child(block, row.attn), child(block, row.mlp)
        if weights(block) != weights(attn) + weights(mlp):
            raise UnsupportedModel(f"{type(block).__name__} has weights outside of {row.attn} and {row.mlp}")
        shapes.append(block_shape(attn, mlp, width, heads))
    stem = child(tower, row.stem)
    joins = merge**2 if row.inside else 1
    return PackedTowerShape(
        blocks=tuple(shapes),
        spans=tuple(row.span if isinstance(row.span, str) else row.span(config, i) for i in range(len(blocks))),
        stem=Part("patch embedding", stem.weight.numel() + _resizing(tower, row), path=path_of(model, stem)),
        parts=tuple(_parts(model, tower, [*blocks, stem, *around], joins, _pool(model, tower, row, width, merge))),
        merge=merge,
        window=0 if row.window is None else row.window(config),
        shared=row.shared,
        extra=row.extra,
        pads=row.pads,
        canvas=row.canvas,
        first=path_of(model, blocks[0]),
        path=path_of(model, tower),
    )


def _parts(model: nn.Module, tower: nn.Module, known: list[nn.Module], joins: int, pool: Part | None) -> list[Part]:
    """Everything with weights beside blocks and patch embedding: linear maps, convolutions, attention pools."""
    parts = [] if pool is None else [pool]
    heads: list[Any] = [
        m
        for m in tower.modules()
        if hasattr(m, "probe") and isinstance(getattr(m, "attention", None), nn.MultiheadAttention)
    ]
    for head in heads:
        path = path_of(model, head)
        rest = weights(head) - weights(head.attention)
        parts.append(multihead_pool(path, head.attention, int(head.probe.shape[1]), rest, path))
    skip = [*known, *heads]
    found = [(module, macs) for _, module, macs in linear_maps(tower, skip)]
    hidden = {id(below) for module in skip for below in module.modules()}
    found += [
        (module, module.weight.numel())
        for module in tower.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and id(module) not in hidden
    ]
    for module, macs in found:
        path = path_of(model, module)
        parts.append(Part(path, macs, path=path, joins=joins))
    return parts


def _pool(model: nn.Module, tower: Any, row: PackedRow, width: int, merge: int) -> Part | None:
    """An average over patches as a product of a matrix `[tokens, patches]` with the patches."""
    if row.pool is None or merge == 1:
        return None
    path = path_of(model, child(tower, row.pool))
    return Part(path, 0, 0, width, path, merge**2)


def _resizing(tower: Any, row: PackedRow) -> int:
    """MACs of one patch in resizing an embedding of places; by interpolation it takes no product."""
    if row.table is None:
        return 0
    around, _, _ = row.table.rpartition(".")
    resize = inspect.unwrap(getattr(child(tower, around), row.resize))
    return 0 if "interpolate" in resize.__code__.co_names else int(child(tower, row.table).weight.numel())
