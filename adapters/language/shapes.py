"""Rows and columns of pictures from arguments of the host's own calls, where pictures have sizes of their own.

Two calls bring them. The inner model is called with them where pixels come along; `generate` encodes pictures before,
and then only the tower sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.pictures import Picture
from .. import hosts
from ..hosts import Role
from .intake_checks import check_shapes


def _of_pixels(value: Tensor, config: Any) -> Tensor:
    """Heights and widths in pixels."""
    return value // (config.vision_config.patch_size * config.spatial_merge_size)


def _of_patches(value: Tensor, config: Any) -> Tensor:
    """Rows and columns of patches."""
    return value // config.downsample_factor


def _merge(vision: Any) -> int:
    """Patches along a side that make one token."""
    kernel = getattr(vision, "merge_kernel_size", None)
    return int(getattr(vision, "merge_size", None) or vision.spatial_merge_size) if kernel is None else int(kernel[0])


def _of_grids(value: Tensor, config: Any) -> Tensor:
    """Frames, rows and columns of patches."""
    merge = _merge(config.vision_config)
    return value // value.new_tensor([1, merge, merge])


def _of_places(value: Tensor, config: Any) -> Tensor:
    """Column and row of each patch, `[..., patches, 2]`, -1 where a picture is padded."""
    vision = config.vision_config
    side = 1 if hasattr(vision, "model_patch_size") else vision.pooling_kernel_size  # merged before the model sees them
    return ((value.flatten(0, -3).amax(1) + 1) // side).flip(-1)


_BY_ARGUMENT: dict[Role, Callable[[Tensor, Any], Tensor]] = {
    hosts.IMAGE_SIZES: _of_pixels,
    hosts.PATCH_SHAPES: _of_patches,
    hosts.IMAGE_GRIDS: _of_grids,
    hosts.CLIP_GRIDS: _of_grids,
    hosts.TOWER_GRIDS: _of_grids,
    hosts.IMAGE_PLACES: _of_places,
    hosts.CLIP_PLACES: _of_places,
    hosts.PIXEL_PLACES: _of_places,
}


def read(role: Role, value: Any, config: Any) -> Tensor:
    """Shapes that an argument tells.

    Args:
        role: of the argument.
        value: of it.
        config: of the whole model.

    Returns:
        int64 `[pictures, 3]`: frames, rows and columns of tokens.

    Raises:
        ParameterError: it tells none.
    """
    make = _BY_ARGUMENT[role]
    shapes = make(check_shapes(role, value, 3 if make is _of_grids else 2, 3 if make is _of_places else 2), config)
    return shapes if shapes.shape[-1] == 3 else torch.nn.functional.pad(shapes, (1, 0), value=1)


def lengths(arguments: Mapping[int, Role], given: Callable[[Role], Any], config: Any) -> dict[int, list[int]] | None:
    """Tokens of each picture and clip, from the arguments of the inner model.

    Args:
        arguments: the argument that tells, by code of the placeholders.
        given: its value in this call.
        config: of the whole model.

    Returns:
        By code, in the order of the placeholders; None where nothing is told.
    """
    found = {}
    for code, role in arguments.items():
        value = given(role)
        if value is None:
            continue
        counts = read(role, value, config).prod(-1)
        frames = given(hosts.CLIP_FRAMES) if role == hosts.CLIP_PLACES else None
        if frames is not None:  # each frame is encoded like a picture
            counts = torch.stack([clip.sum() for clip in counts.split(torch.as_tensor(frames).tolist())])
        found[code] = counts.tolist()
    return found or None


def measure(pictures: list[Picture], calls: list[list[list[int]]]) -> None:
    """Sets grids of pictures, and of each frame of clips, from what towers were told.

    Args:
        pictures: of a call of the language model, row by row.
        calls: frames, rows and columns of each picture of the tower's last calls; hosts encode pictures before clips.
    """
    left = list(calls)
    for video in (True, False):
        kind = [picture for picture in pictures if picture.video == video]
        for picture in kind:
            picture.grid = None
        while kind and left:
            grids = _match(kind, left.pop())
            if grids is not None:
                for picture, grid in zip(kind, grids):
                    picture.grid = grid
                break


def _match(pictures: list[Picture], shapes: list[list[int]]) -> list[tuple[int, int]] | None:
    """The grid of each picture, or None where these are not the shapes of these pictures.

    Beams repeat the rows of a sample, one behind the other, and with them its pictures.
    """
    sizes = [frames * rows * columns for frames, rows, columns in shapes]
    total = sum(len(picture.columns) for picture in pictures)
    if not sum(sizes) or total % sum(sizes):
        return None
    repeat = total // sum(sizes)
    found: list[tuple[int, int]] = []
    begin = at = 0
    for i, picture in enumerate(pictures):
        before = pictures[i - 1] if i else picture
        if picture.row // repeat != before.row // repeat:
            begin = at
        elif picture.row != before.row:
            at = begin
        if at == len(shapes):
            return None
        found.append((shapes[at][1], shapes[at][2]))
        need = len(picture.columns)
        while need > 0 and at < len(shapes):  # a clip takes its frames
            need -= sizes[at]
            at += 1
        if need:
            return None
    return found
