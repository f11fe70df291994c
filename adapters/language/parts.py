"""How the tokens of a picture fall into parts, rows and columns.

Runs of placeholders, position ids and separator embeddings show it; `generate` passes neither picture sizes nor grids,
so nothing here needs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.rows import Picture
from .spec import VLMSpec


@dataclass(frozen=True, eq=False)
class Look:
    """What part functions may look at.

    Attributes:
        pictures: of the call.
        x: `[B, S, C]`, embeddings.
        positions: int64 `[..., B, S]`.
        core: the inner model.
        spec: the family.
        crop: tokens of one crop, where the encoder's outputs told, or None.
    """

    pictures: list[Picture]
    x: Tensor
    positions: Tensor
    core: Any
    spec: VLMSpec
    crop: int | None


def square(n: int) -> tuple[int, int] | None:
    """The grid of a square number of tokens."""
    side = math.isqrt(n)
    return (side, side) if side * side == n and n else None


def _one(look: Look) -> Tensor | None:
    """Every picture is one grid; every frame of a clip is as many queries."""
    for picture in look.pictures:
        picture.grid = square(len(picture.columns))
    clips = [picture for picture in look.pictures if picture.video]
    if not clips:
        return None
    size = int(look.core.config.num_query_tokens)
    for picture in clips:
        picture.grid = None
        _set_frames(picture, [size] * (len(picture.columns) // size))
    return _table(look, [_numbers(picture, size) for picture in look.pictures])


def _frames(count: int) -> list[int]:
    """Part numbers of a clip's frames: 0 is for what shows the whole."""
    return list(range(1, count + 1))


def _set_frames(picture: Picture, sizes: list[int]) -> None:
    """Notes the frames of a clip, of which tokens of each are told."""
    picture.frames = len(sizes)
    picture.cells = sizes[0] if sizes and len(set(sizes)) == 1 else 0


def _numbers(picture: Picture, size: int) -> list[int]:
    """Parts of a picture's tokens: 0, or frames of so many tokens."""
    return [i // size + 1 if picture.video else 0 for i in range(len(picture.columns))]


def _thumbnail(count: int, which: str | None) -> list[int]:
    """Part numbers of `count` parts in order: 0 for the one that shows all."""
    if count == 1 or which == "first":
        return list(range(count))
    return [*range(1, count), 0] if which == "last" else _frames(count)


def _table(look: Look, parts: list[list[int]]) -> Tensor:
    """Parts of each picture's tokens as `[B, S]`."""
    table = torch.zeros(look.x.shape[:2], dtype=torch.int64)
    for picture, numbers in zip(look.pictures, parts):
        table[picture.row, picture.columns] = torch.tensor(numbers)
    return table.to(look.x.device)


def _by_runs(look: Look) -> Tensor | None:
    """Each run of a picture is a crop (or a frame, in a clip)."""
    parts = []
    for picture in look.pictures:
        n, starts = len(picture.columns), picture.runs
        ends = [*starts[1:], n]
        names = _frames(len(starts)) if picture.video else _thumbnail(len(starts), look.spec.thumbnail)
        numbers = [0] * n
        for name, start, end in zip(names, starts, ends):
            numbers[start:end] = [name] * (end - start)
        parts.append(numbers)
        picture.grid = square(n // len(starts))
        if picture.video:
            _set_frames(picture, [end - start for start, end in zip(starts, ends)])
    return _table(look, parts) if any(len(set(numbers)) > 1 for numbers in parts) else None


def _by_chunks(look: Look) -> Tensor | None:
    """A run holds crops of equal size, one behind the other."""
    parts = []
    for picture in look.pictures:
        n = len(picture.columns)
        size = look.crop if look.crop and n % look.crop == 0 else n
        names = _frames(n // size) if picture.video else _thumbnail(n // size, look.spec.thumbnail)
        parts.append([names[i // size] for i in range(n)])
        picture.grid = square(size)
        if picture.video:
            _set_frames(picture, [size] * (n // size))
    return _table(look, parts) if any(len(set(numbers)) > 1 for numbers in parts) else None


def _anyres(look: Look) -> Tensor | None:
    """Thumbnail first, then a canvas of crops with a separator behind each row; found by the separator's embedding."""
    newline = getattr(look.core, "image_newline", None)
    if newline is None:
        return _one(look)
    separator = separators(look.x, newline)
    config = look.core.config.vision_config
    side = config.image_size // config.patch_size
    apart = separator.tolist()
    part = torch.zeros(look.x.shape[:2], dtype=torch.int64)
    for picture in look.pictures:
        n = len(picture.columns)
        if picture.video:
            edge = math.ceil(side / 2)
            size, picture.grid = edge**2, (edge, edge)
            part[picture.row, picture.columns] = torch.tensor(_numbers(picture, size))
            whole = n - sum(apart[picture.row][column] for column in picture.columns)
            _set_frames(picture, [min(size, whole - first) for first in range(0, whole, size)])
            continue
        base = side * side
        numbers = [0] * n
        breaks = [i for i, column in enumerate(picture.columns) if apart[picture.row][column]]
        if n > base and breaks and breaks[0] > base:
            numbers[base:], picture.fields = _canvas(n - base, breaks[0] - base, side)
        part[picture.row, picture.columns] = torch.tensor(numbers)
        picture.grid = (side, side)
    return torch.where(separator, -1, part.to(look.x.device))


def separators(x: Tensor, newline: Tensor) -> Tensor:
    """Which tokens are the host's separator.

    The host writes it in the dtype of the features, which under autocast is a narrower one than the embeddings'.

    Args:
        x: `[..., C]`, embeddings.
        newline: `[C]`, the separator's parameter.

    Returns:
        bool `[...]`.
    """
    found = (x == newline.detach().to(x.dtype)).all(-1)
    if x.dtype == torch.float32:
        for narrow in (torch.bfloat16, torch.float16):
            found |= (x == newline.detach().to(narrow).to(x.dtype)).all(-1)
    return found


def _canvas(n: int, wide: int, side: int) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Crops of a canvas's tokens, 1.. row by row, and rows and columns of each crop.

    What was padded is cut off on two opposite sides alike, so the canvas ends within its outer crops. A canvas that the
    host shrank has tokens of several crops in one; it falls into fields of the size of a crop all the same.

    Args:
        n: tokens, separators included.
        wide: tokens of one row in front of its separator.
        side: rows and columns of a crop.
    """
    high = n // (wide + 1)
    across, down = -(-wide // side), -(-high // side)
    left, top = (across * side - wide) // 2, (down * side - high) // 2
    rows = [(row + top) // side * across + 1 for row in range(high)]
    columns = [(column + left) // side for column in range(wide)]
    fields = {first + column: (rows.count(first), columns.count(column)) for first in rows for column in columns}
    return [first + (column + left) // side for first in rows for column in range(wide + 1)], fields


def _by_time(look: Look) -> Tensor | None:
    """Rotary positions in three dimensions tell time, row and column; a clip's frames are its parts."""
    if look.positions.dim() != 3 or not any(picture.video for picture in look.pictures):
        for picture in look.pictures:
            picture.grid = _grid(look, picture, picture.columns)
        return None
    part = torch.zeros(look.x.shape[:2], dtype=torch.int64, device=look.x.device)
    for picture in look.pictures:
        if not picture.video:
            picture.grid = _grid(look, picture, picture.columns)
            continue
        n = len(picture.columns)
        if len(picture.runs) > 1:  # frames with text between them
            ends = [*picture.runs[1:], n]
            sizes = [end - start for start, end in zip(picture.runs, ends)]
        else:  # rows and columns tell: frames within one second may have one time (Qwen2.5-VL above two a second)
            high, wide = _extent(look, picture, picture.columns)
            sizes = [high * wide] * (n // (high * wide)) if n % (high * wide) == 0 else [n]
        numbers = [frame for frame, size in enumerate(sizes, 1) for _ in range(size)]
        part[picture.row, picture.columns] = torch.tensor(numbers, device=part.device)
        _set_frames(picture, sizes)
        picture.grid = _grid(look, picture, picture.columns[: sizes[0]])
    return part


def _grid(look: Look, picture: Picture, columns: list[int]) -> tuple[int, int] | None:
    """Rows and columns of some tokens of a picture."""
    if look.positions.dim() != 3:
        return square(len(columns))
    height, width = _extent(look, picture, columns)
    return (height, width) if height * width == len(columns) else None


def _extent(look: Look, picture: Picture, columns: list[int]) -> tuple[int, int]:
    """Rows and columns that the rotary positions of some tokens reach over."""
    down, across = (look.positions[i, picture.row, columns] for i in (-2, -1))
    return int(down.max() - down.min()) + 1, int(across.max() - across.min()) + 1


def _by_rows(look: Look) -> Tensor | None:
    """Rows of one picture with a separator id between them, which is text and stays."""
    for picture in look.pictures:
        gaps = sum(b - a > 1 for a, b in zip(picture.columns, picture.columns[1:]))
        n = len(picture.columns)
        picture.grid = (gaps + 1, n // (gaps + 1)) if n % (gaps + 1) == 0 else None
    return None


PARTS: dict[str, Callable[[Look], Tensor | None]] = {
    "one": _one,
    "runs": _by_runs,
    "chunks": _by_chunks,
    "anyres": _anyres,
    "mrope": _by_time,
    "rows": _by_rows,
}
"""By `VLMSpec.parts`: fills in grids and returns parts `[B, S]`, or None for all 0."""
