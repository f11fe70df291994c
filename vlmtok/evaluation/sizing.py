"""How processors of transformers take sizes: a row of dials by the class of the image processor.

A dial is a setting that makes a picture's visual tokens fewer when it is turned down. What count a setting gives is not
written down here: the processor is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ParameterError, UnsupportedModel
from ..loading.models import Loaded
from .twins import embeddings_of

Turn = Callable[["Draft", int], None]


@dataclass
class Draft:
    """A processor of its own and, where the model must know, a twin of the model; dials are turned on them.

    Attributes:
        loaded: what is being made.
        native: the model as it is, never changed.
        twin: whether `loaded.model` is a twin.
    """

    loaded: Loaded
    native: Loaded
    twin: bool = False

    @property
    def pictures(self) -> Any:
        """The image processor."""
        return self.loaded.processor.image_processor

    @property
    def config(self) -> Any:
        """Of the twin."""
        assert self.twin
        return self.loaded.model.config


def fresh(native: Loaded, model: Any = None) -> Draft:
    """A draft whose dials stand as the model came.

    Args:
        native: the model.
        model: a twin of it, or None where the model itself will do.
    """
    processor = copy.copy(native.processor)
    processor.image_processor = copy.copy(processor.image_processor)
    made = replace(native, processor=processor, model=native.model if model is None else model)
    return Draft(made, native, model is not None)


@dataclass(frozen=True)
class Dial:
    """A setting of a processor.

    Attributes:
        name: for people.
        values: what it can be set to, ascending; the last is as it was.
        turn: sets it.
        twin: whether the model must know, so that it needs a twin.
        gaps: whether some values give no whole tokens: turning there raises `Impossible`.
        refuses: from the model, why the dial cannot be turned there, or None.
    """

    name: str
    values: Callable[[Loaded], Sequence[int]]
    turn: Turn
    twin: bool = False
    gaps: bool = False
    refuses: Callable[[Loaded], str | None] = lambda loaded: None


class Impossible(ParameterError):
    """A value of a dial that gives no whole tokens."""


# ---------------------------------------------------------------------- sizes that a processor knows
def _lengths(size: Any) -> dict[str, int]:
    """The lengths that a size of an image processor names."""
    items = size.items() if isinstance(size, Mapping) else vars(size).items()
    return {name: int(value) for name, value in items if value is not None}


def config_of(loaded: Loaded) -> Any:
    """Configuration of a model of transformers."""
    model: Any = loaded.model
    return model.config


def _pictures(loaded: Loaded) -> Any:
    return loaded.processor.image_processor


def _squared(value: Any) -> int:
    return int(value if isinstance(value, int) else next(iter(_lengths(value).values())))


def _areas(loaded: Loaded) -> Sequence[int]:
    found = _pictures(loaded)
    step = (_squared(found.patch_size) * found.merge_size) ** 2
    most = _lengths(found.size)["longest_edge"]
    return [*range(step, most, step), most]


def _set_area(draft: Draft, value: int) -> None:
    least = min(_lengths(draft.pictures.size)["shortest_edge"], value)
    draft.pictures.size = {"shortest_edge": least, "longest_edge": value}


def _edges(loaded: Loaded) -> Sequence[int]:
    found = _pictures(loaded)
    step, most = _squared(found.patch_size), _lengths(found.size)["longest_edge"]
    return [*range(step, most, step), most]


def _set_edge(draft: Draft, value: int) -> None:
    draft.pictures.size = {"longest_edge": value}


# ---------------------------------------------------------------------- tiles
def _up_to(name: str) -> Callable[[Loaded], Sequence[int]]:
    """Whole numbers up to what an attribute of the image processor says."""
    return lambda loaded: range(1, int(getattr(_pictures(loaded), name)) + 1)


def _at_most(most: str, least: str = "") -> Turn:
    """Sets an attribute of the image processor, and lowers the least there may be where it would lie above."""

    def turn(draft: Draft, value: int) -> None:
        found = draft.pictures
        setattr(found, most, value)
        if least and hasattr(found, least):
            setattr(found, least, min(getattr(found, least), value))

    return turn


def _tiled_edges(loaded: Loaded) -> Sequence[int]:
    found = _pictures(loaded)
    most, tile = _lengths(found.size)["longest_edge"], _lengths(found.max_image_size)["longest_edge"]
    return [*range(tile, most, tile), most] if found.do_image_splitting else [most]


def _canvases(loaded: Loaded) -> list[int]:
    """Numbers of tiles that an any-resolution grid offers, ascending."""
    tile = _tile(loaded)
    return sorted({(high // tile) * (wide // tile) for high, wide in _pictures(loaded).image_grid_pinpoints})


def _set_canvas(draft: Draft, value: int) -> None:
    """The model reads the list of canvases, too."""
    tile = _tile(draft.native)
    kept = [
        [high, wide]
        for high, wide in _pictures(draft.native).image_grid_pinpoints
        if (high // tile) * (wide // tile) <= value
    ]
    draft.pictures.image_grid_pinpoints = draft.config.image_grid_pinpoints = kept


def _set_small_tiles(draft: Draft, value: int) -> None:
    """LFM2-VL: one tile means that a picture is not split."""
    _at_most("max_tiles", "min_tiles")(draft, value)
    draft.pictures.do_image_splitting = draft.pictures.do_image_splitting and value > 1


def _small_tiles(loaded: Loaded) -> Sequence[int]:
    found = _pictures(loaded)
    return [1, *range(found.min_tiles, found.max_tiles + 1)] if found.do_image_splitting else [1]


def _patches(loaded: Loaded) -> Sequence[int]:
    found = _pictures(loaded)
    return range(found.merge_size**2, found.max_patches + 1)


SOFT = (70, 140, 280, 560, 1120)
"""Numbers of soft tokens that Gemma4's image processor takes."""


def _soft(loaded: Loaded) -> Sequence[int]:
    return [value for value in SOFT if value <= _pictures(loaded).max_soft_tokens]


# ---------------------------------------------------------------------- the side of a tile
LENGTHS = ("size", "crop_size", "max_image_size")
"""Sizes of image processors that are as long as a tile, or some whole times."""
COUNTS = ("image_seq_length", "image_seq_len", "num_image_tokens")
"""What processors call the tokens of a tile, where they do not count them from the pixels."""
SIDES = {"AyaVisionProcessor": ("img_size", "patch_size"), "Cohere2VisionProcessor": ("patch_size", "")}
"""Processors that know a tile by its side, and what it must be whole times of."""


def _tile(loaded: Loaded) -> int:
    """Side of a tile as the tower has it, in pixels."""
    return _squared_pair(config_of(loaded).vision_config.image_size)


def _patch(loaded: Loaded) -> int:
    return _squared_pair(config_of(loaded).vision_config.patch_size)


def _squared_pair(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])


def _sides(loaded: Loaded) -> Sequence[int]:
    tile, patch = _tile(loaded), _patch(loaded)
    return [*range(patch, tile, patch), tile]


def _set_side(draft: Draft, value: int) -> None:
    """Sizes shrink with the tile; counts with the square of its patches."""
    native, tile, patch = draft.native, _tile(draft.native), _patch(draft.native)
    if value == tile:
        return
    share = (value // patch, tile // patch)
    for name in LENGTHS:
        size = getattr(_pictures(native), name, None)
        if size is not None:
            now = _lengths(getattr(draft.pictures, name))
            setattr(draft.pictures, name, {key: max(value, edge * value // tile) for key, edge in now.items()})
    for name in COUNTS:
        count = getattr(native.processor, name, None)
        if count is not None:
            setattr(draft.loaded.processor, name, _whole(count * share[0] ** 2, share[1] ** 2))
    side, unit = SIDES.get(type(native.processor).__name__, ("", ""))
    if side:
        length = _whole(getattr(native.processor, side) * value, tile)
        setattr(draft.loaded.processor, side, length)
        _whole(length, getattr(native.processor, unit) if unit else 1)
    config = draft.config
    both = not isinstance(config_of(native).vision_config.image_size, int)
    config.vision_config.image_size = [value, value] if both else value
    if getattr(draft.pictures, "image_grid_pinpoints", None):
        grids = [[high // tile * value, wide // tile * value] for high, wide in draft.pictures.image_grid_pinpoints]
        draft.pictures.image_grid_pinpoints = config.image_grid_pinpoints = grids


def restore(config: Any, native: Any) -> None:
    """Sets what dials change in a twin's configuration to what it was.

    Args:
        config: of the twin.
        native: of the model.
    """
    config.vision_config.image_size = native.vision_config.image_size
    if hasattr(native, "image_grid_pinpoints"):
        config.image_grid_pinpoints = native.image_grid_pinpoints


def _whole(value: int, of: int) -> int:
    if value % of:
        raise Impossible(f"{value} / {of} is no whole number")
    return value // of


def _no_positions(loaded: Loaded) -> str | None:
    """Why the tower takes no tile of another size."""
    if config_of(loaded).model_type in FRACTIONS or embeddings_of(loaded.model):
        return None
    return f"the positions of its vision tower ({config_of(loaded).vision_config.model_type}) cannot be interpolated"


FRACTIONS = ("idefics3", "smolvlm")
"""Families whose towers look positions up by the fraction of the picture at which a patch lies."""

AREA = Dial("pixels of a picture", _areas, _set_area)
EDGE = Dial("longest edge of a picture", _edges, _set_edge)
TILES = Dial("most tiles of a picture", _up_to("max_patches"), _at_most("max_patches", "min_patches"))
TILED_EDGE = Dial("longest edge of a picture", _tiled_edges, _set_edge)
CANVAS = Dial("most tiles of a picture", _canvases, _set_canvas, twin=True)
SMALL_TILES = Dial("most tiles of a picture", _small_tiles, _set_small_tiles)
MOST = Dial("most tokens of a picture", _up_to("max_image_tokens"), _at_most("max_image_tokens", "min_image_tokens"))
PATCHES = Dial("most patches of a picture", _patches, _at_most("max_patches"))
SOFT_TOKENS = Dial("most tokens of a picture", _soft, _at_most("max_soft_tokens"))
SIDE = Dial("side of a tile", _sides, _set_side, twin=True, gaps=True, refuses=_no_positions)

ROWS: dict[str, tuple[Dial, ...]] = {
    **dict.fromkeys(
        (
            *("Qwen2VLImageProcessor", "Glm4vImageProcessor", "Glm46VImageProcessor", "PaddleOCRVLImageProcessor"),
            *("GlmgaImageProcessor", "Cosmos3EdgeImageProcessor", "CohereCompassImageProcessor"),
        ),
        (AREA,),
    ),
    "MuseGlimmerImageProcessor": (MOST,),
    "Kimi_K25ImageProcessor": (PATCHES,),
    "PixtralImageProcessor": (EDGE,),
    "Gemma4ImageProcessor": (SOFT_TOKENS,),
    "Lfm2VlImageProcessor": (SMALL_TILES, MOST),
    **dict.fromkeys(("GotOcr2ImageProcessor", "Cohere2VisionImageProcessor"), (TILES, SIDE)),
    "Llama4ImageProcessor": (TILES,),
    **dict.fromkeys(("Idefics3ImageProcessor", "SmolVLMImageProcessor"), (TILED_EDGE, SIDE)),
    **dict.fromkeys(("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"), (CANVAS, SIDE)),
    **dict.fromkeys(
        (
            *("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"),
            *("DeepseekVLImageProcessor", "JanusImageProcessor"),
        ),
        (SIDE,),
    ),
}
"""By class of the image processor: its dials, the first turned down first."""

REFUSED: dict[str, str] = {
    "gemma3": "its projector pools a fixed grid of patches into as many tokens whatever the picture's size",
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo", "aria", "idefics2"),
        "queries read every picture into the same number of tokens, whatever its size",
    ),
}
"""Families, by ``config.model_type``, whose count does not depend on sizes."""


def why_fixed(model: Any) -> str:
    """Why a vision-language model makes as many tokens of every picture, or nothing."""
    kind = model.config.model_type
    return f"{kind} cannot be given fewer tokens: {REFUSED[kind]}" if kind in REFUSED else ""


def dials_of(loaded: Loaded) -> tuple[Dial, ...]:
    """The dials of a vision-language model's processor.

    Raises:
        UnsupportedModel: its count does not depend on sizes, or nothing is known of its processor.
    """
    why, kind = why_fixed(loaded.model), config_of(loaded).model_type
    if why:
        raise UnsupportedModel(f"downsample: {loaded.name}: {why}")
    pictures = getattr(loaded.processor, "image_processor", None)
    names = [cls.__name__ for cls in type(pictures).__mro__]
    plain = [name.removesuffix("Fast").removesuffix("Pil") for name in names]
    found = next((ROWS[name] for name in plain if name in ROWS), None)
    if found is None:
        raise UnsupportedModel(
            f"downsample: it is not known how a {names[0]} ({kind}) takes sizes; known: {', '.join(ROWS)}"
        )
    return found
