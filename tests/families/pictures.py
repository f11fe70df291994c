"""Pictures and clips of many sizes as towers of families take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .build import FAMILIES
from .shots import PATCH

UNITS = ((4, 4), (3, 5), (1, 1), (2, 7), (3, 5))
"""Rows and columns of visual tokens; windows of two by two have borders in the second and fourth."""


def pictures(name: str, units: tuple[tuple[int, int], ...] = UNITS, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``get_image_features``."""
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if name == "mistral3":
        sizes = torch.tensor([[2 * PATCH * side for side in unit] for unit in units])
        shown = torch.zeros(len(units), 3, *sizes.amax(0).tolist())
        for at, (height, width) in enumerate(sizes.tolist()):
            shown[at, :, :height, :width] = pixels(3, height, width)
        return {"pixel_values": shown, "image_sizes": sizes}
    grid = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in units])
    patch = (3, PATCH, PATCH) if name == "paddleocr_vl" else (96,)
    return {"pixel_values": pixels(int(grid.prod(1).sum()), *patch), "image_grid_thw": grid}


def clips(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``get_video_features``: clips of three frames and of two."""
    assert FAMILIES[name].clips
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[3, 4, 6], [2, 4, 10]])
    return {
        "pixel_values_videos": torch.randn(int(grid.prod(1).sum()), 96, generator=generator),
        "video_grid_thw": grid,
    }


def at_tokens(name: str, patches: Tensor, arrays: dict[str, Tensor]) -> Tensor:
    """Means over the patches of each visual token, from rows in the tower's order: `[L, c]` to `[tokens, c]`."""
    if name in ("mistral3", "paddleocr_vl"):
        grid = arrays.get("image_grid_thw")
        sides = arrays["image_sizes"] // PATCH if grid is None else grid[:, 1:]
        parts = patches.split(sides.prod(1).tolist())
        return torch.cat(
            [
                part.unflatten(0, (rows // 2, 2, columns // 2, 2)).mean((1, 3)).flatten(0, 1)
                for part, (rows, columns) in zip(parts, sides.tolist(), strict=True)
            ]
        )
    units = patches.unflatten(0, (-1, 4)).mean(1)
    if name == "qwen2_5_vl":
        grid = arrays.get("image_grid_thw", arrays.get("video_grid_thw"))
        units = units[window_order(grid).argsort()]
    return units


def window_order(grid: Tensor) -> Tensor:
    """Which token stands where in the row of Qwen2.5-VL's tower, by windows of two by two; written out."""
    order, first = [], 0
    for frames, rows, columns in (grid // torch.tensor([1, 2, 2])).tolist():
        for frame in range(frames):
            for top in range(0, rows, 2):
                for left in range(0, columns, 2):
                    order += [
                        first + (frame * rows + y) * columns + x
                        for y in range(top, min(top + 2, rows))
                        for x in range(left, min(left + 2, columns))
                    ]
        first += frames * rows * columns
    return torch.tensor(order)
