"""Towers that pack pictures of any size as data for hooks, from their rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import forms, hosts
from ..base import PackedForm, TowerSpec, child
from .packed_grids import PatchGrid, by_token, patch_grids
from .packed_rows import PACKED_ROWS, PackedRow

_WINDOWS = "get_vision_window_index"
"""The hosts' function that says where the units of a window stand."""


def packed_spec(tower: Any, whole: Any) -> TowerSpec | None:
    """A packed tower as data.

    Args:
        tower: the module that holds it.
        whole: configuration of the model around it.

    Returns:
        None where no row with hook points is for its kind.

    Raises:
        UnsupportedModel: it is of a kind with a row, and its parts are not those of the row.
    """
    config = getattr(tower.config, "vision_config", tower.config)
    row = PACKED_ROWS.get(config.model_type)
    if row is None or row.block is None:
        return None
    blocks = forms.known_blocks(tower, row.layer)
    return TowerSpec(
        block=row.block,
        blocks=blocks,
        num_prefix=row.extra,
        width=int(getattr(config, row.width)),
        heads=int(getattr(config, row.heads)),
        returns_grid=True,
        has_class_token=bool(row.extra),
        packed=_form(tower, config, whole, row, len(blocks)),
    )


def _form(tower: nn.Module, config: Any, whole: Any, row: PackedRow, depth: int) -> PackedForm:
    """How its pictures lie in its rows."""
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    role = row.sizes

    def grids(value: Any) -> list[PatchGrid]:
        if role is None:
            return [(1, value.shape[-2] // patch, value.shape[-1] // patch)] * int(value.shape[:-3].numel())
        return patch_grids(role, value, patch)

    def windows(value: Tensor) -> tuple[Tensor, Tensor]:
        find = forms.beside(tower, _WINDOWS)
        merge, size = config.spatial_merge_size, config.window_size
        order, bounds = find(value, spatial_merge_size=merge, window_size=size, patch_size=patch)
        return order, bounds

    merge, windowed = row.merge(config, whole), row.window is not None
    return PackedForm(
        told=child(tower, row.told),
        sizes=role,
        grids=grids,
        spans=tuple(row.span if isinstance(row.span, str) else row.span(config, i) for i in range(depth)),
        merge=merge,
        shared=row.shared,
        windows=windows if windowed else None,
        readers=tuple(child(tower, row.readers)) if row.readers is not None else (),
        lacks=forms.missing(tower, [_WINDOWS]) if windowed else "",
        masked=row.pads,
        by_token=(lambda value, grids: by_token(value, grids, merge)) if role == hosts.PIXEL_PLACES else None,
    )
