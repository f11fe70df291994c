"""Which part of the user's picture a model's input shows.

Where a patch lies in the picture depends on how it was resized, cropped or padded. Instead of reading each library's
settings, `region` runs the same preprocessing on ramps whose brightness is the coordinate, and reads the mapping off
the result: right for any preprocessing that keeps rows and columns straight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import ParameterError

Box = tuple[float, float, float, float]
"""left, top, right, bottom, in pixels of the user's picture."""

SHORT = 24
"""Pixels of a side below which a ramp has too few greys to be read."""


def region(size: tuple[int, int], preprocess: Any = None, crop: int = 0) -> Box:
    """The part of a picture that the model's input shows; it may reach beyond the picture where it was padded.

    Args:
        size: width and height of the picture.
        preprocess: a transformers processor or image processor, or a callable from a PIL picture to a tensor
            `[3, H, W]` (torchvision, timm and open_clip transforms); None means that the whole picture was resized.
            Processors that hand over flattened patches resize the whole picture too.
        crop: which of several crops.

    Returns:
        Left, top, right and bottom in pixels of the picture.

    Raises:
        ParameterError: the preprocessing gives no straight image of the picture.
    """
    width, height = size
    if preprocess is None or _flattens(preprocess, size):
        return (0.0, 0.0, float(width), float(height))
    times = math.ceil(SHORT / min(size))
    if times > 1:  # what is done to a few pixels is read off the same picture, enlarged
        left, top, right, bottom = region((width * times, height * times), preprocess, crop)
        return (left / times, top / times, right / times, bottom / times)
    across = _fit(preprocess, Image.linear_gradient("L").rotate(90).resize(size, Image.Resampling.BILINEAR), crop, 2)
    down = _fit(preprocess, Image.linear_gradient("L").resize(size, Image.Resampling.BILINEAR), crop, 1)
    return (across[0] * width, down[0] * height, across[1] * width, down[1] * height)


def _flattens(preprocess: Any, size: tuple[int, int]) -> bool:
    """Whether a processor gives patches `[n, D]` instead of pictures."""
    inner = getattr(preprocess, "image_processor", preprocess)
    if not hasattr(inner, "preprocess"):
        return False
    given = inner(images=Image.new("RGB", size), return_tensors="pt")
    pixels = given["pixel_values"]
    if "spatial_shapes" in given:
        return False  # they can be put together again
    # Pictures come as [B, 3, H, W] or [B, crops, 3, H, W]; patches have fewer axes, or are tiny pictures themselves.
    return isinstance(pixels, Tensor) and (pixels.dim() < 4 or pixels.shape[-1] < 32)


def _fit(preprocess: Any, ramp: Image.Image, crop: int, axis: int) -> tuple[float, float]:
    """First and last edge of the input along an axis, as shares of the picture's side."""
    flat = ramp.size
    black = _pixels(preprocess, Image.new("RGB", flat, (0, 0, 0)), crop)
    white = _pixels(preprocess, Image.new("RGB", flat, (255, 255, 255)), crop)
    shown = _pixels(preprocess, Image.merge("RGB", (ramp,) * 3), crop)
    span = white - black
    inside = span.abs() > 0.5 * span.abs().max()  # padding does not follow the picture
    share = torch.where(inside, (shown - black) / torch.where(inside, span, 1.0), torch.nan)
    line = torch.nanmedian(torch.nanmedian(share, 0).values, 0 if axis == 2 else 1).values
    place = torch.arange(line.numel(), dtype=torch.float64) + 0.5
    # The ends of the ramp are flat where resizing clamps; the middle gives the straight line.
    good = ~line.isnan() & (line > 0.04) & (line < 0.96)
    if int(good.sum()) < 2:
        raise ParameterError("this preprocessing shows no straight image of the picture; pass a transform to pixels")
    x, y = place[good], line[good].double()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    start = y.mean() - slope * x.mean()
    # A ramp over n pixels runs from half a pixel to n minus half a pixel.
    side = flat[0] if axis == 2 else flat[1]
    grey = _grey_line(ramp, axis)
    begin, end = float(start), float(start + slope * line.numel())
    return _place(grey, begin, side), _place(grey, end, side)


def _grey_line(ramp: Image.Image, axis: int) -> tuple[float, float]:
    """Grey at the first edge of the ramp and its rise over the whole side, as a straight line."""
    side = ramp.size[0] if axis == 2 else ramp.size[1]
    values = [
        ramp.getpixel((i, 0) if axis == 2 else (0, i)) / 255.0  # type: ignore[operator]
        for i in range(side)
    ]
    line = torch.tensor(values, dtype=torch.float64)
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    good = (line > 0.04) & (line < 0.96)
    x, y = place[good], line[good]
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(y.mean() - slope * x.mean()), float(slope)


def _place(grey: tuple[float, float], value: float, side: int) -> float:
    return (value - grey[0]) / grey[1]


def _pixels(preprocess: Any, image: Image.Image, crop: int) -> Tensor:
    """The model's input `[3, H, W]`, whatever gave it."""
    inner = getattr(preprocess, "image_processor", preprocess)
    if hasattr(inner, "preprocess"):
        given = inner(images=image, return_tensors="pt")
        pixels = given["pixel_values"]
        if "spatial_shapes" in given:
            crop = min(crop, len(pixels) - 1)
            pixels = _together(pixels[crop], *given["spatial_shapes"][crop].tolist())
    else:
        pixels = preprocess(image)
    if not isinstance(pixels, Tensor):
        raise ParameterError(f"preprocessing must give a tensor of pixels, got {type(pixels).__name__}")
    while pixels.dim() > 4:
        pixels = pixels[0]
    if pixels.dim() == 4:
        pixels = pixels[min(crop, pixels.shape[0] - 1)]
    if pixels.dim() != 3:
        raise ParameterError(f"preprocessing must give pixels [3, H, W], got {list(pixels.shape)}")
    return pixels.float()


def _together(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Patches `[n, side * side * 3]`, padded, as the picture `[3, rows * side, columns * side]` that they were."""
    side = math.isqrt(patches.shape[1] // 3)
    grid = patches[: rows * columns].reshape(rows, columns, side, side, 3)
    return grid.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)
