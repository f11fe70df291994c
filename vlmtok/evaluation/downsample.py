"""The baseline that every method has to beat: the picture made smaller until its visual tokens are the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..core.settings import check_keep, keep_count
from ..errors import ParameterError, TargetError, UnsupportedModel
from ..guard import guarded
from ..lab.prompts import NO_PROMPT, encode_prompt
from ..loading.models import Loaded, encoder_of
from ..loading.problems import taken_in
from .dialling import Search, Sizes, counts
from .sizing import dials_of
from .twins import patch_of, tower_twin


@dataclass(frozen=True, eq=False)
class Downsampled:
    """A model that makes fewer visual tokens of its pictures.

    Attributes:
        loaded: the model and what prepares its pictures; weights are shared with the model that was given.
        asked: visual tokens of the prompt that were allowed.
        tokens: those that are reached, all pictures together; of a tower, patches.
        each: the same by picture.
        bare: without downsampling.
        settings: what was turned down, and to what.
    """

    loaded: Loaded
    asked: int
    tokens: int
    each: tuple[int, ...]
    bare: int
    settings: dict[str, int] = field(default_factory=dict)

    def inputs(self, picture: Image.Image, prompt: str | None = None) -> dict[str, Any]:
        """What the model takes for one picture: arguments of ``generate``, or ``pixel_values`` `[1, 3, H, W]`.

        Args:
            picture: RGB, of the size for which this was made.
            prompt: as for `vlmtok.compare`; towers take none.

        Raises:
            ParameterError: a language model without a prompt, or a tower with one.
        """
        loaded = self.loaded
        if loaded.language:
            if prompt is None:
                raise ParameterError(f"downsample: {loaded.name} answers prompts, and none is given")
            return encode_prompt(loaded, picture, prompt)
        if prompt is not None:
            raise ParameterError(NO_PROMPT.format(loaded.name))
        assert loaded.pixels is not None
        prepare = loaded.pixels
        made = taken_in(loaded.name, picture.size, lambda: prepare(picture))
        return {"pixel_values": made.to(loaded.device, loaded.dtype)}


@guarded
def downsample(model: Loaded, pictures: Image.Image | Sequence[Image.Image], *, tokens: int | float) -> Downsampled:
    """Makes pictures smaller until they become so many visual tokens.

    The processor is asked what count a size gives, and its sizes are turned down until the count fits: the number of
    pixels where a family takes any size, the number of tiles and then their side where it cuts pictures into tiles, the
    side alone where every picture gets one size. Where the tower has positions for one size, they are interpolated in
    a second module over the same weights. The ratio of the picture's sides is kept where the family keeps it.

    Args:
        model: from `vlmtok.load`, without a compression.
        pictures: of one prompt, RGB.
        tokens: visual tokens of all of them together, of a tower its patches: a number, or a float in (0, 1] as a
            share of what they are without this.

    Returns:
        The model as it takes these pictures; pictures of other sizes may get another count. `tokens` is the largest
        count that the family reaches and that is not above the budget.

    Raises:
        ParameterError: no picture, no such budget, or the model carries a compression.
        TargetError: the family makes no picture so few tokens; the message names the fewest.
        UnsupportedModel: the family's count does not depend on sizes, its tower's positions cannot be interpolated, or
            its processor is not known.
        LoadError: the processor cannot take a picture of this size.
    """
    return Downsampler(model)(pictures, tokens)


class Downsampler:
    """`downsample` for many pictures: what was found for a size is kept.

    Args:
        model: from `vlmtok.load`, without a compression.
    """

    def __init__(self, model: Loaded) -> None:
        self.native = model
        self._dials = dials_of(model) if model.language else ()
        self._bare: dict[Sizes, tuple[int, ...]] = {}
        self._found: dict[tuple[Sizes, int], Downsampled] = {}
        self._made: dict[tuple[int, ...], Loaded] = {}

    def __call__(self, pictures: Image.Image | Sequence[Image.Image], tokens: int | float) -> Downsampled:
        """As `downsample`."""
        shown = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
        if not shown:
            raise ParameterError("downsample: there is no picture")
        sizes = tuple(one.size for one in shown)
        if self.native.language:
            if sizes not in self._bare:
                self._bare[sizes] = counts(self.native, sizes)
            bare = sum(self._bare[sizes])
        else:
            rows, columns = self._grid(shown)
            bare = rows * columns
        asked = _asked(tokens, bare)
        if asked >= bare:
            each = self._bare[sizes] if self.native.language else (bare,)
            return Downsampled(self.native, asked, bare, each, bare)
        if (sizes, asked) not in self._found:
            if self.native.language:
                self._found[sizes, asked] = self._language(sizes, asked, bare)
            else:
                self._found[sizes, asked] = self._tower((rows, columns), asked)
        return self._found[sizes, asked]

    # ------------------------------------------------------------------ vision-language models
    def _language(self, sizes: Sizes, asked: int, bare: int) -> Downsampled:
        """Tiles are made fewer first, then smaller: a tower sees best at the size that it was trained for."""
        native, why = self.native, ""
        dials = []
        for dial in self._dials:
            refused = dial.refuses(native)
            if refused is None:
                dials.append(dial)
            else:
                why = f": {refused}"
        if not dials:
            raise UnsupportedModel(f"downsample: {native.name} cannot be given smaller pictures{why}")
        search = Search(native, dials, sizes, asked)
        best = search.run()
        if best is None:
            shown = ", ".join(f"{wide} x {high}" for wide, high in sizes)
            raise TargetError(
                f"downsample: {native.name} makes at least {search.fewest} visual tokens of {shown} pixels, "
                f"{asked} asked{why}"
            )
        if best not in self._made:
            self._made[best] = search.final(best)
        each = search.counted[best]
        turned = {dial.name: value for dial, value in search.turned(best).items()}
        return Downsampled(self._made[best], asked, sum(each), each, bare, turned)

    # ------------------------------------------------------------------ towers
    def _pixels(self, picture: Image.Image) -> Tensor:
        assert self.native.pixels is not None
        prepare = self.native.pixels
        return taken_in(self.native.name, picture.size, lambda: prepare(picture))

    def _grid(self, pictures: Sequence[Image.Image]) -> tuple[int, int]:
        """Rows and columns of patches of the one picture that a tower looks at."""
        if len(pictures) != 1:
            raise ParameterError(f"downsample: {self.native.name} is a vision tower: one picture, not {len(pictures)}")
        size, patch = self._pixels(pictures[0]).shape[-2:], patch_of(self.native.model)
        return size[0] // patch[0], size[1] // patch[1]

    def _tower(self, grid: tuple[int, int], asked: int) -> Downsampled:
        """The largest grid of about the same shape; pixels are resized behind the model's own preprocessing."""
        rows, columns = largest_grid(grid, asked)
        key = (rows, columns)
        if key not in self._made:
            patch = patch_of(self.native.model)
            size = (rows * patch[0], columns * patch[1])
            model = tower_twin(self.native.model, size)
            self._made[key] = replace(
                self.native, model=model, encode=encoder_of(model), pixels=_resizing(self._pixels, size)
            )
        found, bare = rows * columns, grid[0] * grid[1]
        return Downsampled(
            self._made[key], asked, found, (found,), bare, {"rows of patches": rows, "columns of patches": columns}
        )


def _resizing(prepare: Callable[[Image.Image], Tensor], size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """Prepared pixels `[1, 3, H, W]` at another size; what a crop left out stays out."""

    def pixels(image: Image.Image) -> Tensor:
        return F.interpolate(prepare(image).float(), size=size, mode="bicubic", antialias=True, align_corners=False)

    return pixels


# ---------------------------------------------------------------------- rules
def largest_grid(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of at most so many patches, in about the ratio of a grid.

    Args:
        grid: rows and columns.
        most: at least 1.
    """
    tried = [
        (rows, columns)
        for rows in range(1, grid[0] + 1)
        for columns in {max(1, math.floor(rows * grid[1] / grid[0])), max(1, math.ceil(rows * grid[1] / grid[0]))}
        if rows * columns <= most
    ]
    return max(tried, key=lambda one: one[0] * one[1], default=(1, 1))


def _asked(tokens: int | float, bare: int) -> int:
    """The budget as a number of tokens; a share is rounded as methods round it."""
    check_keep(tokens, "downsample", "tokens")
    return tokens if isinstance(tokens, int) else keep_count(tokens, bare)
