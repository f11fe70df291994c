"""What a processor's output will be in a model of a family, as counts: nothing runs, and no weights are needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...core.pictures import Picture
from ...core.sight import Grid, Seen, Sight
from .. import hosts
from ..hosts import Role
from ..towers.packed_grids import patch_grids
from . import shapes
from .packing import Packing
from .parts import PARTS, Look
from .placeholders import column_codes, placeholders
from .spans import IMAGE, NONE, VIDEO, find_pictures
from .spec import VLMSpec


def preview(spec: VLMSpec, core: Any, stem: Any, inputs: Mapping[str, Any], between: int | None) -> Sight:
    """The pictures of one prompt, as hooks would see them in `generate`.

    Args:
        spec: the family.
        core: the inner model; it may be without data.
        stem: the tower's patch embedding, a convolution, or None.
        inputs: what the processor made of the prompt, by the host's names.
        between: id of a token that stands between pictures.
    """

    def given(role: Role) -> Any:
        return next((inputs[name] for name in role.names if inputs.get(name) is not None), None)

    packing = None if spec.packing_methods is None else Packing(spec, core)
    crops, patches, grids = _tower(spec, core, packing, stem, given)
    if spec.boundary is not None:
        return Sight((), crops, patches, grids)
    ids = given(hosts.IDS)
    types = None if spec.types is None else given(spec.types)
    codes = column_codes(core, placeholders(core, spec), spec, ids, None, types)
    assert codes is not None
    if packing is None:
        lengths = shapes.lengths(dict(zip((IMAGE, VIDEO), spec.grid_arguments)), given, core.config)
    else:
        lengths = packing.lengths(given, inputs)
    row = codes[0].tolist()
    found = find_pictures([row], lengths)
    part = _parts(spec, core, packing, found, row, given, crops)
    ends = [column for column, number in enumerate(ids[0].tolist()) if number == between]
    return Sight(_by_picture(found, row, part, ends), crops, patches, grids)


# ---------------------------------------------------------------------- the tower
def _tower(
    spec: VLMSpec, core: Any, packing: Packing | None, stem: Any, given: Any
) -> tuple[int, int, tuple[tuple[int, int, int], ...]]:
    """Rows of the tower, patches of one, and grids of pictures with sizes of their own."""
    pixels, clips = given(hosts.PIXELS), given(hosts.CLIP_PIXELS)
    roles = [role for role in (*spec.grid_arguments, spec.tower_size_argument) if role is not None]
    told = [(role, given(role)) for role in dict.fromkeys(roles)]
    grids = [one for role, value in told if value is not None for one in patch_grids(role, value, _side(core))]
    if grids:
        shared = hosts.PATCH_SHAPES not in roles and hosts.IMAGE_PLACES not in roles
        if shared:
            return 1, sum(frames * rows * columns for frames, rows, columns in grids), tuple(grids)
        padded = (clips if pixels is None else pixels).shape[-2]
        return len(grids), int(padded), tuple(grids)
    if packing is not None:
        counts = packing.crops(given) + ([] if clips is None else [clips.shape[0] * clips.shape[1]])
        shown = clips if pixels is None else pixels
    else:
        shown = clips if pixels is None else pixels
        counts = [shown.shape[:-3].numel()]
    return sum(counts), _patches(core, stem, shown.shape[-2:]), ()


def _side(core: Any) -> int:
    """Pixels of a patch's side."""
    patch = core.config.vision_config.patch_size
    return int(patch if isinstance(patch, int) else patch[0])


def _patches(core: Any, stem: Any, pixels: Any) -> int:
    """Patches of a picture of so many pixels; 0 where its tower is a foreign model that does not say."""
    if stem is None and not hasattr(core.config.vision_config, "patch_size"):
        return 0
    if stem is None:
        size = core.config.vision_config.patch_size
        edges = [side // one for side, one in zip(pixels, (size, size) if isinstance(size, int) else size)]
    else:
        edges = [(side - k) // s + 1 for side, k, s in zip(pixels, stem.kernel_size, stem.stride)]
    return int(edges[0] * edges[1])


# ---------------------------------------------------------------------- the language model
def _parts(
    spec: VLMSpec,
    core: Any,
    packing: Packing | None,
    pictures: list[Picture],
    row: list[int],
    given: Any,
    crops: int,
) -> Tensor | None:
    """Parts of the columns, `[1, S]`, as the adapter tells them from embeddings and positions; fills in grids."""
    x = torch.zeros(1, len(row), 1)
    positions = torch.arange(len(row)).expand(3, 1, -1).clone()
    if packing is not None:  # a separator's embedding is 1, any other 0
        canvases = iter(packing.separators(given))
        for picture in pictures:
            if picture.video:  # frames that are pooled behind the projector get one newline
                x[0, picture.columns[-1]] = bool(spec.packing_methods and spec.packing_methods[1])
            else:
                x[0, picture.columns] = next(canvases)
    for role, video in zip(spec.grid_arguments, (False, True)):
        value = given(role)
        if value is None or spec.positions != "mrope":
            continue
        read = iter(shapes.read(role, value, core.config).tolist())
        for picture in pictures:
            if picture.video == video:
                _, high, wide = next(read)
                place = torch.arange(len(picture.columns))
                here = torch.stack([place // (high * wide), place // wide % high, place % wide])
                positions[:, 0, picture.columns] = here
    total = sum(len(picture.columns) for picture in pictures)
    crop = total // crops if spec.lengths_of == "crop" and crops and total % crops == 0 else None
    seen = SimpleNamespace(image_newline=torch.ones(1) if packing is not None else None, config=core.config)
    part = PARTS[spec.parts](Look(pictures, x, positions, seen, spec, crop))
    if spec.tower_size_argument is not None:
        told = [(role, given(role)) for role in spec.grid_arguments]
        calls = [shapes.read(role, value, core.config).tolist() for role, value in told if value is not None]
        shapes.measure(pictures, calls)
    return part


def _by_picture(
    pictures: list[Picture], row: list[int], part: Tensor | None, ends: list[int]
) -> tuple[tuple[Seen, ...], ...]:
    """What stands between two ends belongs to one picture of the prompt."""
    found: list[list[Seen]] = [[]]
    last = -1
    for picture in pictures:
        first, after = picture.columns[0], picture.columns[-1]
        while ends and ends[0] < first:
            ends = ends[1:]
            found.append([])
        numbers = [] if part is None else part[0, picture.columns].tolist()
        names = sorted({number for number in numbers if number >= 0})
        gap = row[last + 1 : first].count(NONE) if found[-1] else 0
        inside = row[first:after].count(NONE)
        sizes = tuple(numbers.count(name) for name in names)
        counts = dict(zip(names, sizes)) or {-1: len(picture.columns)}
        grids = tuple(_grid(picture, name, n) for name, n in counts.items())
        columns = tuple(picture.columns)
        apart = numbers.count(-1)
        of = (inside, gap, grids, columns, picture.frames, picture.cells)
        found[-1].append(Seen(len(columns), sizes, apart, *of))
        last = after
    return tuple(map(tuple, found))


def _grid(picture: Picture, part: int, n: int) -> Grid | None:
    """Rows and columns of the n tokens of a part; -1 is all of a picture without parts."""
    grid = picture.fields.get(part, picture.grid)
    return grid if grid is not None and grid[0] * grid[1] == n else None
