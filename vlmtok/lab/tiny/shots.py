"""Pictures and clips as each family's processor would hand them over: ids, marks, pixels, and how they are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .prompts import END, FIRST_FRAME, IMAGE, MARK, START, VIDEO, Shot

SIDE, PATCH = 32, 8
"""Of a tower's input, in pixels."""
PATCH_VALUES = 3 * 2 * 4 * 4
"""Of a packed patch: channels, two frames, and 4 x 4 pixels."""
GLM_VIDEO = (MARK + 8, MARK + 9)
"""GLM's marks around a clip."""

Maker = Callable[[torch.Generator], Shot]
"""Makes a shot with pixels from a generator."""


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    """Random pixels."""
    return torch.randn(*shape, generator=generator)


def tiles(count: int = 1, tokens: int = 16, side: int = SIDE) -> Maker:
    """A picture as so many tiles whose placeholders follow each other; the thumbnail is the last of several."""
    edge = int(tokens**0.5)
    parts = [tile for tile in range(1, count) for _ in range(tokens)] + [0] * tokens

    def make(generator: torch.Generator) -> Shot:
        return Shot(
            (START, *[IMAGE] * (count * tokens), END),
            {"pixel_values": pixels(generator, count, 3, side, side)},
            ((1, edge, edge),) if count == 1 else (),
            tuple(parts),
        )

    return make


def plain(tokens: int = 16, side: int = SIDE) -> Maker:
    """A picture of one size, without marks."""
    make = tiles(1, tokens, side)
    return lambda generator: replace(make(generator), ids=(IMAGE,) * tokens)


def marked(before: list[tuple[int, ...]], after: tuple[int, ...], tokens: int = 16, thumbnail: str = "last") -> Maker:
    """A picture as tiles, each with its own marks in front.

    Args:
        before: marks in front of each tile.
        after: marks behind the last one.
        tokens: placeholders of a tile.
        thumbnail: whether the whole picture comes ``first`` or ``last``.
    """
    count, edge = len(before), int(tokens**0.5)
    ids: list[int] = []
    for marks in before:
        ids += [*marks, *[IMAGE] * tokens]
    order = [*range(1, count), 0] if thumbnail == "last" else list(range(count))

    def make(generator: torch.Generator) -> Shot:
        return Shot(
            (*ids, *after),
            {"pixel_values": pixels(generator, count, 3, SIDE, SIDE)},
            ((1, edge, edge),) * count,
            tuple(part for part in order for _ in range(tokens)),
        )

    return make


@dataclass(frozen=True)
class AnyRes:
    """A picture as a thumbnail and a grid of crops on a canvas, un-padded, with a newline behind every canvas row.

    Attributes:
        height, width: of the picture, in pixels.
        canvas: height and width of the crops' grid, in pixels.
        edge: patches along a crop's side.
        most: crops that a batch leaves room for.
    """

    height: int
    width: int
    canvas: tuple[int, int]
    edge: int = SIDE // PATCH
    most: int = 5

    def unpadded(self) -> tuple[int, int]:
        """Rows and columns of patches that show the picture."""
        rows, columns = (side // SIDE * self.edge for side in self.canvas)
        if self.width / self.height > columns / rows:
            padding = (rows - int(round(self.height * columns / self.width, 7))) // 2
            return rows - 2 * padding, columns
        padding = (columns - int(round(self.width * rows / self.height, 7))) // 2
        return rows, columns - 2 * padding

    def crops(self) -> tuple[int, ...]:
        """Crop that each token of the canvas comes from, 1.. row by row; -1 for newlines."""
        (down, across), (rows, columns) = (side // SIDE for side in self.canvas), self.unpadded()
        top, left = (down * self.edge - rows) // 2, (across * self.edge - columns) // 2
        found = []
        for row in range(rows):
            first = (top + row) // self.edge * across + 1
            found += [first + (left + column) // self.edge for column in range(columns)] + [-1]
        return tuple(found)

    def __call__(self, generator: torch.Generator) -> Shot:
        """The picture, with pixels from a generator."""
        rows, columns = self.unpadded()
        crops = 1 + self.canvas[0] * self.canvas[1] // SIDE**2
        shown = pixels(generator, crops, 3, SIDE, SIDE)
        room = shown.new_zeros(self.most - crops, 3, SIDE, SIDE)
        arrays = {
            "pixel_values": torch.cat([shown, room])[None],
            "image_sizes": torch.tensor([[self.height, self.width]]),
        }
        return Shot((IMAGE,) * (self.edge**2 + rows * (columns + 1)), arrays, crops=(0,) * self.edge**2 + self.crops())


def one_crop(generator: torch.Generator) -> Shot:
    """A picture of LLaVA-OneVision among several in a prompt: the thumbnail and one newline."""
    shown = torch.cat([pixels(generator, 1, 3, SIDE, SIDE), torch.zeros(4, 3, SIDE, SIDE)])
    arrays = {"pixel_values": shown[None], "image_sizes": torch.tensor([[SIDE, SIDE]])}
    return Shot((IMAGE,) * 17, arrays, parts=(0,) * 16 + (-1,))


def pooled_clip(frames: int, newline: bool = True) -> Maker:
    """A clip of LLaVA-OneVision: frames pooled to a quarter, one newline at the end (LLaVA-NeXT-Video has none)."""

    def make(generator: torch.Generator) -> Shot:
        count = (SIDE // PATCH // 2) ** 2
        parts = [frame for frame in range(FIRST_FRAME, FIRST_FRAME + frames) for _ in range(count)]
        arrays = {"pixel_values_videos": pixels(generator, 1, frames, 3, SIDE, SIDE)}
        last = (-1,) * newline
        return Shot((VIDEO,) * (frames * count + newline), arrays, (), (*parts, *last), True, VIDEO)

    return make


def packed(rows: int, columns: int, *patch: int) -> Maker:
    """A picture whose patches come in one row with those of all others; four become one token."""

    def make(generator: torch.Generator) -> Shot:
        count = rows * columns
        arrays = {
            "pixel_values": pixels(generator, 4 * count, *patch),
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
        }
        return Shot((START, *[IMAGE] * count, END), arrays, ((1, rows, columns),), (0,) * count)

    return make


def packed_clip(frames: int, rows: int, columns: int, layout: str, values: int = PATCH_VALUES) -> Maker:
    """A clip whose patches come in one row.

    Args:
        frames: pairs of frames.
        rows: of tokens.
        columns: of tokens.
        layout: ``run`` (all frames in one run), ``stamped`` (a time stamp and marks around each frame) or ``glm`` (the
            same with placeholders of pictures, and marks around all).
        values: of a patch.
    """
    count = rows * columns
    placeholder = IMAGE if layout == "glm" else VIDEO

    def make(generator: torch.Generator) -> Shot:
        if layout == "run":
            ids = [START, *[VIDEO] * (frames * count), END]
            grids = [(frames, rows, columns)]
        else:
            ids, grids = [], [(1, rows, columns)] * frames
            for frame in range(frames):
                stamp, one = [MARK + frame], [START, *[placeholder] * count, END]
                ids += one + stamp if layout == "glm" else stamp + one
            if layout == "glm":
                ids = [GLM_VIDEO[0], *ids, GLM_VIDEO[1]]
        arrays = {
            "pixel_values_videos": pixels(generator, 4 * frames * count, values),
            "video_grid_thw": torch.tensor([[frames, 2 * rows, 2 * columns]]),
        }
        parts = tuple(frame for frame in range(FIRST_FRAME, FIRST_FRAME + frames) for _ in range(count))
        return Shot(tuple(ids), arrays, tuple(grids), parts, True, placeholder)

    return make


def rows_with_breaks(rows: int, columns: int) -> Maker:
    """A picture of Mistral 3: a break, which is text, behind every row; another mark behind the last."""
    unit = 2 * PATCH

    def make(generator: torch.Generator) -> Shot:
        ids: list[int] = []
        for row in range(rows):
            ids += [*[IMAGE] * columns, END if row == rows - 1 else START]
        shown = torch.zeros(1, 3, 64, 64)
        shown[:, :, : rows * unit, : columns * unit] = pixels(generator, 1, 3, rows * unit, columns * unit)
        arrays = {"pixel_values": shown, "image_sizes": torch.tensor([[rows * unit, columns * unit]])}
        return Shot(tuple(ids), arrays, ((1, rows, columns),), (0,) * (rows * columns))

    return make


def naflex(shapes: list[tuple[int, int]], marks: bool) -> Maker:
    """A picture of LFM2-VL: tiles of any shape, padded to the same number of patches; the thumbnail is the last."""
    ids: list[int] = [START]
    parts: list[int] = []
    for index, (rows, columns) in enumerate(shapes):
        count = rows * columns
        ids += [*([MARK + index] if marks else []), *[IMAGE] * count]
        parts += [0 if index == len(shapes) - 1 else index + 1] * count

    def make(generator: torch.Generator) -> Shot:
        patches = [4 * rows * columns for rows, columns in shapes]
        arrays = {
            "pixel_values": torch.stack(
                [torch.cat([pixels(generator, n, 48), torch.zeros(64 - n, 48)]) for n in patches]
            ),
            "spatial_shapes": torch.tensor([[2 * rows, 2 * columns] for rows, columns in shapes]),
            "pixel_attention_mask": torch.stack([(torch.arange(64) < n).long() for n in patches]),
        }
        return Shot((*ids, END), arrays, tuple((1, *shape) for shape in shapes), tuple(parts))

    return make


def _pooled_patches(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Pixels [64, 48] and (x, y) [64, 2] of the patches of a Gemma 4 picture; -1 where it is padded."""
    place = torch.full((64, 2), -1)
    y, x = torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij")
    place[: 4 * rows * columns] = torch.stack([x.flatten(), y.flatten()], -1)
    return torch.rand(64, 48, generator=generator) * (place[:, :1] >= 0), place


def pooled_patches(rows: int, columns: int) -> Maker:
    """A picture of Gemma 4: patches with their places, padded; four become one token."""

    def make(generator: torch.Generator) -> Shot:
        count = rows * columns
        shown, place = _pooled_patches(generator, rows, columns)
        arrays = {"pixel_values": shown[None], "image_position_ids": place[None]}
        return Shot((START, *[IMAGE] * count, END), arrays, ((1, rows, columns),), (0,) * count)

    return make


def pooled_frames(frames: int, rows: int, columns: int) -> Maker:
    """A clip of Gemma 4: a time stamp and marks around each frame."""

    def make(generator: torch.Generator) -> Shot:
        count = rows * columns
        ids: list[int] = []
        for frame in range(frames):
            ids += [MARK + frame, START, *[VIDEO] * count, END]
        made = [_pooled_patches(generator, rows, columns) for _ in range(frames)]
        arrays = {
            "pixel_values_videos": torch.stack([shown for shown, _ in made]),
            "video_position_ids": torch.stack([place for _, place in made]),
            "num_frames_per_video": torch.tensor([frames]),
        }
        parts = tuple(frame for frame in range(FIRST_FRAME, FIRST_FRAME + frames) for _ in range(count))
        return Shot(tuple(ids), arrays, ((1, rows, columns),) * frames, parts, True, VIDEO)

    return make


def by_sample(rows: list[list[Tensor]]) -> Tensor:
    """Joins tiles as `[B, most tiles of a row, ...]`; missing ones are all zero, which the host leaves out."""
    joined = [torch.cat(row) if row else None for row in rows]
    shown = next(row for row in joined if row is not None)
    most = max(len(row) for row in joined if row is not None)
    room = [shown.new_zeros(most, *shown.shape[1:]) for _ in rows]
    for space, row in zip(room, joined):
        if row is not None:
            space[: len(row)] = row
    return torch.stack(room)


def queries(generator: torch.Generator) -> Shot:
    """A picture of BLIP-2: as many placeholders as the Q-Former has queries."""
    return Shot((IMAGE,) * 8, {"pixel_values": pixels(generator, 1, 3, SIDE, SIDE)})


def frames_of_queries(generator: torch.Generator) -> Shot:
    """A clip of InstructBLIP: as many placeholders a frame as the Q-Former has queries."""
    return Shot((VIDEO,) * 8, {"pixel_values": pixels(generator, 1, 2, 3, SIDE, SIDE)}, (), (), True, VIDEO)
