"""Rows and columns of patches from what a host tells a tower or its model of pictures with sizes of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def by_token(places: Tensor, grids: list[PatchGrid], merge: int) -> list[Tensor]:
    """Patches of pictures in the order of the tokens that they are pooled into, by their places.

    Args:
        places: int64 `[..., N, 2]`, column and row of each patch, -1 behind those of a picture.
        grids: of the pictures.
        merge: patches along the side of a token.

    Returns:
        int64 `[patches]` of each picture.

    Raises:
        ValueError: its patches do not fill its grid in front of the padding.
    """
    found = []
    for one, (_, rows, columns) in zip(places.flatten(0, -3), grids):
        column, row = one[: rows * columns].unbind(-1)
        token = row // merge * (columns // merge) + column // merge
        apart = (row * columns + column).unique().numel() == rows * columns  # no two on one place, none of padding
        if not apart or bool((one[: rows * columns] < 0).any()):
            raise ValueError(f"{rows} x {columns} patches, some of them missing or behind padding")
        if bool((one[rows * columns :] >= 0).any()):
            raise ValueError(f"more patches than {rows} x {columns}")
        found.append(token.argsort(stable=True))
    return found
