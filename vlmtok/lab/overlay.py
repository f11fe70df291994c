"""Pictures of what a compression did, with Pillow alone.

Where a patch lies in the user's picture depends on how it was resized, cropped or padded. Instead of reading each
library's settings, `region` runs the same preprocessing on ramps whose brightness is the coordinate, and reads the
mapping off the result: right for any preprocessing that keeps rows and columns straight.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..core.trace import PictureTrace, Trace
from ..errors import ParameterError
from ..guard import guarded

if TYPE_CHECKING:
    from ..compression import Compression

Box = tuple[float, float, float, float]
"""left, top, right, bottom, in pixels of the user's picture."""

DARK, DIM = 0.18, 0.45


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


@guarded
def overlay(
    image: Image.Image,
    run: Compression | Trace | PictureTrace,
    picture: int = 0,
    *,
    preprocess: Any = None,
    part: int | None = None,
) -> Image.Image:
    """Draws what became of each patch of a picture.

    Patches that stayed alone keep their looks; merged ones share one colour a group; patches dropped before the
    language model are dark, those dropped inside it dim. What the model never saw (cropped away) is grey.

    Args:
        image: the picture as the user has it; for a clip, the frame.
        run: the compression (made with ``trace=True``) after a pass, or its trace.
        picture: which picture of the pass.
        preprocess: how the picture became the model's input (see `region`); crops can be placed only with it.
        part: which part to draw: 0 the thumbnail or only picture, 1.. crops or frames. By default all crops where
            there are any, else the whole picture; of a clip the first frame.

    Returns:
        A new RGB picture of the same size.

    Raises:
        ParameterError: no such picture or part, or its patches form no grid.
    """
    if not isinstance(image, Image.Image):
        raise ParameterError(f"overlay() draws on a PIL picture, got {type(image).__name__}")
    found = _picture(run, picture)
    base = image.convert("RGB")
    pieces = _pieces(found, base.size, preprocess, part)
    grey = Image.blend(base.convert("L").convert("RGB"), Image.new("RGB", base.size, (128, 128, 128)), 0.5)
    seen = Image.new("L", base.size, 0)
    for piece in pieces:
        left, top, right, bottom = piece.box
        ImageDraw.Draw(seen).rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), fill=255)
    drawn = Image.composite(base, grey, seen)
    sizes, gone, owner = found.group_sizes().tolist(), found.dropped_at(), found.owner.tolist()
    shade = Image.new("RGBA", base.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(shade)
    for piece in pieces:
        for place, patch in enumerate(piece.patches):
            site = gone[patch]
            if owner[patch] < 0:
                light = DIM if site is not None and site.stage == "decoder" else DARK
                pen.rectangle(piece.cell(place), fill=(0, 0, 0, round(255 * (1 - light))))
            elif sizes[patch] > 1:
                pen.rectangle(piece.cell(place), fill=(*_colour(owner[patch]), 115))
    drawn = Image.alpha_composite(drawn.convert("RGBA"), shade).convert("RGB")
    for piece in pieces:
        _outline(drawn, [owner[patch] for patch in piece.patches], piece)
    return drawn


@dataclass(frozen=True)
class _Piece:
    """A grid of patches and where it lies in the picture."""

    box: Box
    grid: tuple[int, int]
    patches: list[int]

    def cell(self, place: int) -> tuple[int, int, int, int]:
        """Pixels of one cell, both ends included."""
        row, column = divmod(place, self.grid[1])
        left, top, right, bottom = self.box
        wide, high = (right - left) / self.grid[1], (bottom - top) / self.grid[0]
        return (
            round(left + column * wide),
            round(top + row * high),
            round(left + (column + 1) * wide) - 1,
            round(top + (row + 1) * high) - 1,
        )


def _pieces(found: PictureTrace, size: tuple[int, int], preprocess: Any, part: int | None) -> list[_Piece]:
    """The grids to draw, each with its place in the picture."""
    grids = found.grids()
    if part is not None and part not in grids:
        raise ParameterError(f"part {part} of this picture is no grid; grids: {sorted(grids) or 'none'}")
    if not grids:
        raise ParameterError("the patches of this picture form no single grid; there is nothing to draw them on")
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    crops = sorted(p for p in grids if p > 0)
    canvas = found.canvas
    if part is None and canvas is not None:
        return [_Piece(_field(size, canvas[0], (0, 0, *canvas[0])), canvas[0], canvas[1].tolist())]
    if part is not None:
        wanted = [part]
    elif found.video:
        wanted = crops[:1]
    else:
        wanted = crops if crops and preprocess is not None else [0]
    pieces = []
    for number in wanted:
        if number not in grids:
            raise ParameterError(f"part {number} of this picture is no grid; grids: {sorted(grids)}")
        grid, patches = grids[number]
        place = found.place(number)
        if canvas is not None and place is not None:
            box = _field(size, canvas[0], place)
        elif number == 0 and crops:
            box = whole  # a thumbnail shows all of it
        else:
            box = region(size, preprocess, 0 if found.video else _crop_index(found, number))
        pieces.append(_Piece(box, grid, patches.tolist()))
    return pieces


def _field(size: tuple[int, int], grid: tuple[int, int], place: tuple[int, int, int, int]) -> Box:
    """Pixels of some rows and columns of a canvas: first row and column, and those behind the last.

    The picture fills the canvas in one direction, and lies in the middle of the other: rows or columns of padding were
    cut off, but not parts of them.
    """
    wide, high = size[0] / grid[1], size[1] / grid[0]
    side = max(wide, high)
    if grid[0] - size[1] / side < 2 and grid[1] - size[0] / side < 2:
        wide = high = side  # else it was stretched
    top, left, bottom, right = place
    x, y = (size[0] - grid[1] * wide) / 2, (size[1] - grid[0] * high) / 2
    return (x + left * wide, y + top * high, x + right * wide, y + bottom * high)


def _crop_index(found: PictureTrace, part: int) -> int:
    """Which of the model's crops shows a part: crops lie in the order of their tokens."""
    if found.parts is None:
        return 0
    order = list(dict.fromkeys(p for p in found.parts.tolist() if p >= 0))
    return order.index(part)


def _picture(run: Any, picture: int) -> PictureTrace:
    if isinstance(run, PictureTrace):
        return run
    if not isinstance(run, Trace) and not hasattr(run, "trace"):
        raise ParameterError(f"overlay() takes a compression or its trace, got {type(run).__name__}")
    trace = run if isinstance(run, Trace) else run.trace()
    if not 0 <= picture < len(trace):
        raise ParameterError(f"picture {picture} does not exist; the pass had {len(trace)}")
    return trace[picture]


def _colour(group: int) -> tuple[int, int, int]:
    """A colour of its own for each group: steps of the golden angle around the wheel."""
    red, green, blue = colorsys.hsv_to_rgb((group * 0.381966) % 1.0, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _outline(image: Image.Image, owner: list[int], piece: _Piece) -> None:
    """Thin lines between cells of different slots."""
    pen = ImageDraw.Draw(image)
    rows, columns = piece.grid
    line = (255, 255, 255)
    for place, slot in enumerate(owner):
        row, column = divmod(place, columns)
        x0, y0, x1, y1 = piece.cell(place)
        if column + 1 < columns and slot != owner[place + 1]:
            pen.line((x1, y0, x1, y1), fill=line)
        if row + 1 < rows and slot != owner[place + columns]:
            pen.line((x0, y1, x1, y1), fill=line)
