"""Named shapes of published models, so that `estimate` needs no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial

from ..core.model_shape import BlockShape, LanguageShape, ModelShape, Part, TowerShape
from ..core.signals import AHEAD, CACHE_SIGNALS, DECODER_SIGNALS, PER_TOKEN, tower_signals
from ..core.site import Layout, StageLayout
from ..errors import ParameterError, hint
from .published import PUBLISHED

HALF = 2
"""Bytes of a cached value: the models are released in half precision."""


# ---------------------------------------------------------------------- stages
def tower_layout(tower: TowerShape, last: int = -1, prefix: int | None = None) -> StageLayout:
    """What a tower offers to methods.

    Args:
        tower: its shape.
        last: the last block whose output is used; negative ones count from the end.
        prefix: protected tokens in front of a row; None means all protected ones.
    """
    return StageLayout(
        depth=tower.depth,
        width=tower.blocks[0].width,
        heads=tower.blocks[0].heads,
        last=last % tower.depth,
        points=frozenset({"start", "mid", "end"}),
        provides=tower_signals(tower.protected),
        num_prefix=tower.protected if prefix is None else prefix,
    )


def language_layout(language: LanguageShape) -> dict[str, StageLayout]:
    """What a language model offers to methods: the stages ``projected``, ``decoder`` and ``cache``."""
    block, depth = language.blocks[0], language.depth
    points, signals = frozenset({"start", "end"}), frozenset(DECODER_SIGNALS)
    return {
        "projected": StageLayout(1, block.width, 0, 0, provides=frozenset({"text"}) | AHEAD),
        "decoder": StageLayout(depth, block.width, block.heads, depth - 1, points, signals),
        "cache": StageLayout(
            depth, block.kv_heads * block.head_width, block.kv_heads, depth - 1, provides=CACHE_SIGNALS
        ),
    }


# ---------------------------------------------------------------------- families
def _tower(
    width: int, depth: int, heads: int, patch: int, side: int, hidden: int | None = None, protected: int = 1
) -> TowerShape:
    """A tower of square pictures of `side` pixels."""
    grid = side // patch
    block = BlockShape.of(width, hidden or 4 * width, heads)
    stem = 3 * patch * patch * width
    return TowerShape((block,) * depth, protected + grid * grid, protected, stem, grid=(grid, grid))


def _vit(name: str, tower: TowerShape, classes: int = 1000) -> ModelShape:
    """A classifier."""
    width = tower.blocks[0].width
    tower = _with(tower, Part("head", width * classes))
    return ModelShape(name, Layout(name, {"vision": tower_layout(tower)}), tower)


def _with(tower: TowerShape, *parts: Part) -> TowerShape:
    return replace(tower, parts=parts)


def _lone(name: str, tower: TowerShape) -> ModelShape:
    """A tower without a head."""
    return ModelShape(name, Layout(name, {"vision": tower_layout(tower)}), tower)


def _clip(name: str, tower: TowerShape, text_width: int, text_depth: int, text_heads: int, embed: int) -> ModelShape:
    """A dual encoder with 77 text tokens, of which start and end of text are protected."""
    block = BlockShape.of(text_width, 4 * text_width, text_heads)
    text = TowerShape((block,) * text_depth, 77, 2, parts=(Part("text projection", text_width * embed),))
    tower = _with(tower, Part("projection", tower.blocks[0].width * embed))
    layout = Layout(name, {"vision": tower_layout(tower), "text": tower_layout(text, prefix=0)})
    return ModelShape(name, layout, tower, text)


def _siglip_pool(width: int, hidden: int) -> Part:
    """One learned query that attends to all tokens, and an MLP behind it."""
    return Part("pool", 2 * width * width + 2 * width * hidden, 2 * width * width + 2 * width)


def _vlm(
    name: str,
    tower: TowerShape,
    language: LanguageShape,
    *,
    parts: tuple[int, ...] = (),
) -> ModelShape:
    """A tower, a projector of two linear maps, and a language model.

    Args:
        name: of the preset.
        tower: its vision tower.
        language: its language model.
        parts: tokens of a picture's parts, where it has several.
    """
    source, target = tower.blocks[0].width, language.blocks[0].width
    projector = Part("projector", source * target + target * target)
    single = not parts
    # Crops want whole grids: rows get their full length back behind the tower.
    tower = replace(tower, spread=not single)
    stages = {"vision": replace(tower_layout(tower, -2), carries=single or PER_TOKEN)}
    if single:
        stages["features"] = StageLayout(1, source, 0, 0, provides=frozenset({"protected"}))
    stages.update(language_layout(language))
    patches = tower.tokens - tower.protected
    crops = sum(parts) // patches if parts else 1
    tile = None if single else 0
    layout = Layout(name, stages)
    return ModelShape(name, layout, tower, None, (projector,), language, crops * patches, crops, parts, tile=tile)


def _language(
    width: int, hidden: int, depth: int, heads: int, vocabulary: int, kv_heads: int | None = None
) -> LanguageShape:
    """A Llama or Qwen2: gated MLPs."""
    block = BlockShape.of(width, hidden, heads, kv_heads, gated=True)
    block = replace(block, kv_bytes=2 * block.kv_heads * block.head_width * HALF)
    return LanguageShape((block,) * depth, Part("lm_head", width * vocabulary))


# ---------------------------------------------------------------------- rows
_CLIP_L_336 = _tower(1024, 24, 16, 14, 336)
_SO400M = _tower(1152, 27, 16, 14, 384, 4304, protected=0)
_VICUNA_7B = _language(4096, 11008, 32, 32, 32064)
_VICUNA_13B = _language(5120, 13824, 40, 40, 32064)

PRESETS: Mapping[str, Callable[[str], ModelShape]] = {
    "llava-1.5-7b": partial(_vlm, tower=_CLIP_L_336, language=_VICUNA_7B),
    "llava-1.5-13b": partial(_vlm, tower=_CLIP_L_336, language=_VICUNA_13B),
    # A thumbnail and a canvas of four crops, 576 tokens each as papers count; row separators are left out.
    "llava-next-7b": partial(_vlm, tower=_CLIP_L_336, language=_VICUNA_7B, parts=(576, 4 * 576)),
    "llava-next-13b": partial(_vlm, tower=_CLIP_L_336, language=_VICUNA_13B, parts=(576, 4 * 576)),
    # Made of their configurations; LLaVA's above are written as papers count them.
    **{name: row for name, row in PUBLISHED.items() if not name.startswith(("llava-1.5", "llava-next"))},
    "clip-vit-b-16": partial(
        _clip, tower=_tower(768, 12, 12, 16, 224), text_width=512, text_depth=12, text_heads=8, embed=512
    ),
    "clip-vit-l-14": partial(
        _clip, tower=_tower(1024, 24, 16, 14, 224), text_width=768, text_depth=12, text_heads=12, embed=768
    ),
    "clip-vit-l-14-336": partial(_lone, tower=_CLIP_L_336),
    "siglip-so400m-14-384": partial(_lone, tower=_with(_SO400M, _siglip_pool(1152, 4304))),
    "vit-t-16": partial(_vit, tower=_tower(192, 12, 3, 16, 224)),
    "vit-s-16": partial(_vit, tower=_tower(384, 12, 6, 16, 224)),
    "vit-b-16": partial(_vit, tower=_tower(768, 12, 12, 16, 224)),
    "vit-b-16-384": partial(_vit, tower=_tower(768, 12, 12, 16, 384)),
    "vit-l-16": partial(_vit, tower=_tower(1024, 24, 16, 16, 224)),
    "deit-t": partial(_vit, tower=_tower(192, 12, 3, 16, 224)),
    "deit-s": partial(_vit, tower=_tower(384, 12, 6, 16, 224)),
    "deit-b": partial(_vit, tower=_tower(768, 12, 12, 16, 224)),
    "mae-b": partial(_vit, tower=_tower(768, 12, 12, 16, 224)),
    "mae-l": partial(_vit, tower=_tower(1024, 24, 16, 16, 224)),
    "mae-h": partial(_vit, tower=_tower(1280, 32, 16, 14, 224)),
}
"""Name to what makes the shape; `preset` makes it."""


@lru_cache
def preset(name: str) -> ModelShape:
    """A published model as counts and widths.

    Args:
        name: a key of `PRESETS`.

    Returns:
        The shape; cached values in half precision.

    Raises:
        ParameterError: no such preset; the message names them all.
    """
    if name not in PRESETS:
        raise ParameterError(f"no preset {name!r}{hint(name, PRESETS)} Presets: {', '.join(PRESETS)}")
    return PRESETS[name](name)
