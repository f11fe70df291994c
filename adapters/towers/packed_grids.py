"""Rows and columns of patches from what a host tells a tower or its model of pictures with sizes of their own."""

from __future__ import annotations

from typing import Any

import torch

from .. import hosts
from ..hosts import Role

PatchGrid = tuple[int, int, int]
"""Frames, rows and columns of patches of a picture."""


def patch_grids(role: Role, value: Any, patch: int) -> list[PatchGrid]:
    """Grids that an argument tells.

    Args:
        role: of the argument.
        value: of it, on any device, which is read.
        patch: pixels along the side of a patch.
    """
    value = torch.as_tensor(value)
    if role in (hosts.IMAGE_GRIDS, hosts.CLIP_GRIDS, hosts.TOWER_GRIDS):
        return [(int(frames), int(rows), int(columns)) for frames, rows, columns in value.tolist()]
    if role == hosts.IMAGE_SIZES:
        value = value // patch
    elif role != hosts.PATCH_SHAPES:  # column and row of each patch, -1 where a picture is padded
        value = (value.flatten(0, -3).amax(1) + 1).flip(-1)
    return [(1, int(rows), int(columns)) for rows, columns in value.tolist()]
