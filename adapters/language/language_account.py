"""Vision-language models as counts and widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ...core.model_shape import (
    LATE,
    BlockShape,
    LanguageShape,
    ModelShape,
    PackedTowerShape,
    Part,
    TowerShape,
    Uncounted,
)
from ...errors import UnsupportedModel
from ..account import class_name, heads_of, linear_maps, path_of, weights
from ..base import child
from ..hosts import LOGITS, Arguments
from ..towers.packed_account import packed_tower
from ..towers.tower_account import hf_tower
from .layer_account import has_matrices, layer_shape
from .masks import layer_kinds, sources
from .spec import VLMSpec


def of_hf_vlm(adapter: Any) -> ModelShape:
    """A vision-language model of transformers."""
    model, core, lm = adapter.model, adapter.core, adapter.lm
    uncounted: list[Uncounted] = []
    path = adapter.spec.projector
    vision, packed = _vision(adapter, uncounted)
    projector: list[Part] = []
    mixing = path and _mixes(child(core, path))
    if mixing:
        where = path_of(model, child(core, path))
        uncounted.append(Uncounted(f"{where} is not counted (it {mixing})", where, adapter.spec.boundary is None))
    if path and not mixing and (vision is not None or packed is not None):
        module = child(core, path)
        projector = heads_of(model, module)
        # Some multiply by a parameter of their own, behind pooling: as many rows as they give.
        alone = [] if isinstance(module, nn.Linear) else module.named_parameters(recurse=False)
        own = [(name, p) for name, p in alone if p.dim() == 2]
        projector += [Part(name, p.numel(), path=path_of(model, module)) for name, p in own]
        joins = 1 if adapter.spec.joins is None else adapter.spec.joins(core.config)
        projector = [replace(part, joins=joins) for part in projector]
    language = None if lm is None else _language(model, lm, uncounted)
    counted = [] if lm is None else [module for module in (lm, _output(model)) if module is not None]
    counted += [child(core, name) for name in (adapter.spec.tower, path) if name and _has(core, name)]
    apart = adapter.spec.boundary is None
    uncounted += [Uncounted(f"{name} is not counted", name, apart) for name in _beside(model, counted)]
    # Where tokens are pooled, or a picture has several crops, only the prompt tells how many there are.
    visual = vision.tokens - vision.protected if vision is not None and adapter.spec.tower_cut == "slots" else 0
    return ModelShape(
        class_name(model),
        adapter.layout(),
        vision,
        projector=tuple(projector),
        language=language,
        visual=visual,
        packed=packed,
        uncounted=tuple(uncounted),
        tile=_tile(adapter.spec, core.config),
    )


def _mixes(module: nn.Module) -> str | None:
    """What a projector does to several tokens at once, or None where each of its rows is multiplied alone."""
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention) or hasattr(part, "q_proj"):
            return "attends to the tokens of a picture"
        if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1):
            return "convolves the grid of a picture"
    return None


def _tile(spec: VLMSpec, config: Any) -> int | None:
    """`ModelShape.tile` of a family."""
    if spec.varies:
        return 0
    if spec.joins is None:
        return None
    vision = config.vision_config
    sides = [(one, one) if isinstance(one, int) else tuple(one) for one in (vision.image_size, vision.patch_size)]
    return int((sides[0][0] // sides[1][0]) * (sides[0][1] // sides[1][1])) // spec.joins(config)


def _vision(adapter: Any, uncounted: list[Uncounted]) -> tuple[TowerShape | None, PackedTowerShape | None]:
    """The vision tower in one of its two forms; neither, with the reason, where it is not known."""
    from ..towers.hf_rows import vision_spec

    model, core = adapter.model, adapter.core
    path = ""
    try:
        tower = child(core, adapter.spec.tower)
        path = path_of(model, tower)
        if not hasattr(tower, "config"):
            raise UnsupportedModel(f"a {type(tower).__name__} says nothing of its sizes")
        around = [child(core, adapter.spec.projector)] if adapter.spec.projector else []
        packed = packed_tower(model, tower, core.config, around)
        if packed is not None:
            return None, replace(packed, slots=adapter.spec.slots is not None and adapter.spec.slots(core))
        spec = adapter.tower() or vision_spec(tower)
        return hf_tower(tower, model, spec, tower, around), None
    except UnsupportedModel as problem:  # no such path, or no row for this kind of tower
        uncounted.append(Uncounted(f"the vision tower is not counted ({problem})", path))
        return None, None


def _has(core: Any, path: str) -> bool:
    try:
        return child(core, path) is not None
    except UnsupportedModel:
        return False


def _holds(outer: nn.Module, module: nn.Module) -> bool:
    return any(below is module for below in outer.modules())


def _output(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _beside(model: nn.Module, counted: list[nn.Module], prefix: str = "") -> Iterator[str]:
    """Paths of modules with weights that are no part of what is counted, the outermost ones."""
    for name, module in model.named_children():
        if any(_holds(one, module) for one in counted):
            continue
        if any(_holds(module, one) for one in counted):
            yield from _beside(module, counted, f"{prefix}{name}.")
        elif weights(module):
            yield f"{prefix}{name}"


def _language(model: Any, lm: Any, uncounted: list[Uncounted]) -> LanguageShape | None:
    size = next(lm.parameters()).element_size()
    blocks, kinds = [], layer_kinds(lm.config, len(lm.layers))
    read = sources(lm.config, kinds)
    for index, (layer, kind) in enumerate(zip(lm.layers, kinds)):
        block = layer_shape(layer, lm.config, kind, size)
        if block is None:
            parts = ", ".join(name for name, part in layer.named_children() if has_matrices(part))
            what = f"layer {index} of {type(lm).__name__} has parts of another form than those known: {parts}"
            uncounted.append(Uncounted(f"the language model is not counted ({what})", path_of(model, lm)))
            return None
        blocks.append(replace(block, source=read.get(index)))
    # What stands beside the layers (inputs of every layer out of one projection) takes the tokens that enter the first.
    beside = sum(macs for _, _, macs in linear_maps(lm, [lm.layers]))
    blocks[0] = replace(blocks[0], beside=blocks[0].beside + beside)
    late = _late(model, lm, blocks)
    if late is not None:
        blocks = [replace(block, late=block.shared) for block in blocks]
    output = _output(model)
    head = None
    if output is not None:
        head = Part("lm_head", weights(output), path=path_of(model, output))
    return LanguageShape(tuple(blocks), head, late)


def _late(model: Any, lm: Any, blocks: list[BlockShape]) -> Part | None:
    """Where tokens reach the layers that keep no keys, if the host drops those before whose logits nobody wants."""
    first = next((i for i, block in enumerate(blocks) if block.shared), None)
    how = str(getattr(lm.config, "_attn_implementation", ""))
    if first is None or "flash" in how or "flex" in how or not Arguments(lm, (), [LOGITS]).has(LOGITS):
        return None  # flash and flex attention cannot look from the last tokens alone
    return Part(LATE, 0, path=path_of(model, lm.layers[first].self_attn.q_proj))
