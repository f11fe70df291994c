"""From the arguments of `estimate` to what goes into a model, as counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.model_shape import ModelShape
from ..core.settings import check_range
from ..core.sight import Sight
from ..cost.planned_rows import Prompt, share
from ..errors import ParameterError
from .subject import Subject

TEXT = 64
"""Text tokens of a prompt unless given."""


@dataclass(frozen=True)
class Asked:
    """Arguments of `estimate`, as given; `every` is whether the head sees all tokens."""

    text_tokens: Any = None
    pictures: int = 1
    batch: int = 1
    visual_tokens: int | None = None
    crops: int | None = None
    parts: Any = None
    image_size: Any = None
    frames: int | None = None
    every: bool = False


def prompt_of(subject: Subject, asked: Asked) -> tuple[Prompt, list[str]]:
    """Arguments as counts, and what to know of them.

    Raises:
        ParameterError: one is not possible, does not fit the others, or is missing.
        LoadError: the processor takes no such pictures.
    """
    for name in ("pictures", "batch", "visual_tokens", "crops", "frames"):
        value = getattr(asked, name)
        if value is not None:
            check_range(value, "estimate", name, 1, kind=int)
    sizes = _sizes(asked)
    shape = subject.shape
    free = asked.visual_tokens is None and asked.crops is None and asked.parts is None
    if sizes is None and free and not shape.visual and subject.size is not None:
        sizes = (subject.size,) * asked.pictures
    if sizes is None:
        return _told(shape, asked), []
    sight = subject.sight(sizes, asked.frames)
    return _shown(shape, asked, sight), [_sentence(sizes, asked, sight)]


def _sizes(asked: Asked) -> tuple[tuple[int, int], ...] | None:
    """Width and height of each picture."""
    given = asked.image_size
    if given is None:
        if asked.frames is not None and asked.visual_tokens is None:
            raise ParameterError(
                "estimate: frames= are those of a clip; image_size=(width, height) says how large, or visual_tokens= "
                "how many tokens all of them have in the language model"
            )
        return None
    also = [name for name in ("visual_tokens", "crops", "parts") if getattr(asked, name) is not None]
    if also:
        raise ParameterError(f"estimate: image_size says how many {also[0]} there are; give one of the two")
    several = isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Sequence)
    found = tuple(map(tuple, given)) if several else (given,) * asked.pictures
    for size in found:
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
            raise ParameterError(f"estimate: image_size={given!r} must be (width, height) in pixels, or several such")
        for side in size:
            check_range(side, "estimate", "image_size", 1, kind=int)
    if several and asked.pictures not in (1, len(found)):
        raise ParameterError(f"estimate: image_size has {len(found)} sizes for {asked.pictures} pictures")
    return tuple((size[0], size[1]) for size in found)


# ---------------------------------------------------------------------- what a processor makes of pictures
def _shown(shape: ModelShape, asked: Asked, sight: Sight) -> Prompt:
    """The prompt of pictures that a processor has seen."""
    if _is_tower(shape):
        return Prompt(asked.batch, sight.crops, (), 0, (), 1, sight.patches, grids=sight.grids)
    texts = texts_of(asked.text_tokens, len(sight.pictures))
    text, seen = [texts[0]], []
    for picture, behind in zip(sight.pictures, texts[1:]):
        for i, one in enumerate(picture):
            if i:
                text.append(one.gap)
            seen.append(one)
        text.append(behind)
    return Prompt(
        asked.batch,
        len(seen),
        tuple(text),
        patches=sight.patches,
        every=asked.every,
        grids=sight.grids,
        seen=tuple(seen),
        seen_rows=sight.crops,
    )


def _is_tower(shape: ModelShape) -> bool:
    """Whether no language model reads what the tower gives, or none in which tokens can be found."""
    return shape.language is None and not shape.layout.has("decoder")


def _sentence(sizes: tuple[tuple[int, int], ...], asked: Asked, sight: Sight) -> str:
    """What pictures became, in words."""
    kind = "picture" if asked.frames is None else f"clip of {asked.frames} frames"
    size = ", ".join(f"{wide} x {high}" for wide, high in dict.fromkeys(sizes))
    many = f"{len(sizes)} {kind.replace('picture', 'pictures').replace('clip', 'clips')}" if len(sizes) > 1 else kind
    tokens = sum(one.tokens for picture in sight.pictures for one in picture)
    apart = sum(one.apart for picture in sight.pictures for one in picture)
    said = [f"{tokens:,} visual tokens"] if tokens else []
    if apart:
        said[0] += f", {apart} of them separators"
    if sight.grids:
        grids = [" x ".join(map(str, grid[1:] if grid[0] == 1 else grid)) for grid in dict.fromkeys(sight.grids)]
        said.append(f"{'grid' if len(sight.grids) == 1 else 'grids'} of {', '.join(grids)} patches")
    rows = "row" if sight.crops == 1 else "rows"
    said.append(f"{sight.crops} {rows} of the tower with {sight.patches:,} patches")
    return f"{many} of {size} pixels, by the model's processor: {'; '.join(said)}"


# ---------------------------------------------------------------------- what is told in numbers
def _told(shape: ModelShape, asked: Asked) -> Prompt:
    """The prompt of pictures whose tokens are given, or those of the model."""
    patches = 0 if shape.vision is None else shape.vision.tokens - shape.vision.protected
    if _is_tower(shape):
        if asked.crops is not None or asked.parts is not None:
            raise ParameterError(f"estimate: crops and parts are for vision-language models; {shape.name} is a tower")
        words = 0
        if shape.text is not None:
            words = shape.text.tokens if asked.text_tokens is None else _one(asked.text_tokens)
        return Prompt(asked.batch, asked.pictures, (), 0, (), 1, asked.visual_tokens or patches, words)
    rows, visual = _crops(shape, asked)
    text = texts_of(asked.text_tokens, asked.pictures)
    frames = asked.frames or 0
    if frames and (asked.parts is not None or visual % frames):
        raise ParameterError(
            f"estimate: {visual} visual tokens as {frames} frames: frames are parts of equal size, so parts= cannot be "
            "given too, and visual_tokens= must be a multiple"
        )
    falls = _parts(shape, frames or asked.parts, rows, visual, patches)
    each = "features" in shape.layout.stages  # every patch is a token of the language model
    if (each or shape.packed is not None) and visual % rows:
        raise ParameterError(f"estimate: visual_tokens={visual} cannot be shared by {rows} crops")
    if each:
        patches = visual // rows
    return Prompt(asked.batch, asked.pictures, text, visual, falls, rows, patches, 0, asked.every, frames=frames)


def _crops(shape: ModelShape, asked: Asked) -> tuple[int, int]:
    """Rows of the tower for a picture, and its visual tokens: given, or as the model makes them, never guessed.

    Raises:
        ParameterError: they do not follow from what is given.
    """
    visual, crops, tile = asked.visual_tokens, asked.crops, shape.tile
    if tile is not None and crops is None:
        crops = asked.frames  # each is a row of the tower
    if tile is None:
        rows = crops or shape.crops
    elif tile:
        rows = crops or (visual or shape.visual) // tile
    else:
        known = visual in (None, shape.visual)
        rows = crops or (shape.crops if known else 0)
        if not rows:
            raise ParameterError(
                f"estimate: pictures of {shape.name} are several rows of its tower (crops), and visual_tokens={visual} "
                "does not say how many: pass crops=, or image_size= in place of both"
            )
    visual = visual or shape.visual * rows // shape.crops or (tile or 0) * rows
    if tile and visual != tile * rows:
        told = f"visual_tokens={visual}" + ("" if crops is None else f" with crops={crops}")
        raise ParameterError(
            f"estimate: {shape.name} makes {tile} visual tokens of each row of its tower, so {told} is not possible; "
            f"nearest: {max(1, round(visual / tile)) * tile}, or pass image_size="
        )
    if not visual:
        raise ParameterError(
            f"estimate: {shape.name} does not say how many tokens a picture has; pass visual_tokens= or image_size="
        )
    return rows, visual


def texts_of(text_tokens: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    """Text tokens before the first picture, between pictures, behind the last.

    Raises:
        ParameterError: they are not that many.
    """
    given = TEXT if text_tokens is None else text_tokens
    if not isinstance(given, (int, Iterable)):
        raise ParameterError(f"estimate: text_tokens={given!r} must be an integer, or several")
    texts = (*[0] * pictures, given) if isinstance(given, int) else tuple(given)
    if len(texts) != pictures + 1:
        raise ParameterError(
            f"estimate: text_tokens={given!r} must be one number, or {pictures + 1}: before the first picture, between "
            "pictures, behind the last"
        )
    for count in texts:
        check_range(count, "estimate", "text_tokens", 0, kind=int)
    return texts


def _one(text_tokens: int | Sequence[int]) -> int:
    check_range(text_tokens, "estimate", "text_tokens", 2, kind=int)
    assert isinstance(text_tokens, int)
    return text_tokens


def _parts(
    shape: ModelShape, parts: int | Sequence[int] | None, crops: int, visual: int, patches: int
) -> tuple[int, ...]:
    if parts is None:
        if crops == shape.crops and sum(shape.parts) == visual:
            return shape.parts
        if shape.tile == 0 and crops > 1 and visual % crops:  # a thumbnail, and a canvas that no picture fills evenly
            first = (patches,) if 0 < patches < visual else ()
            return (*first, *share(visual - sum(first), [1] * (crops - len(first))))
        parts = crops
    if isinstance(parts, int):
        check_range(parts, "estimate", "parts", 1, kind=int)
        if visual % parts:
            raise ParameterError(f"estimate: visual_tokens={visual} cannot be shared by {parts} equal parts")
        return () if parts == 1 else (visual // parts,) * parts
    if sum(parts) != visual:
        raise ParameterError(f"estimate: parts={tuple(parts)!r} must sum to the picture's {visual} tokens")
    return tuple(parts)
