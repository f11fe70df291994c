"""Vision-language models as counts and widths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...core.model_shape import LATE, BlockShape, LanguageShape, ModelShape, Part
from ...errors import UnsupportedModel
from ..account import class_name, heads_of, linear_maps, path_of, weights
from ..base import child
from ..hosts import LOGITS, Arguments
from ..towers.tower_account import hf_tower
from .layer_account import has_matrices, layer_shape
from .masks import layer_kinds


def of_hf_vlm(adapter: Any) -> ModelShape:
    """A vision-language model of transformers."""
    from ..towers.hf_rows import vision_spec

    model, core, lm = adapter.model, adapter.core, adapter.lm
    notes: list[str] = []
    vision, path = None, adapter.spec.projector
    try:
        tower = child(core, adapter.spec.tower)
        spec = adapter.tower() or vision_spec(tower)
        vision = hf_tower(tower, model, spec, tower, [child(core, path)] if path else [])
    except UnsupportedModel as problem:  # no such path, or no row for this kind of tower
        notes.append(f"the vision tower is not counted ({problem})")
    projector: list[Part] = []
    if path and vision is not None:
        module = child(core, path)
        projector = heads_of(model, module)
        # Some multiply by a parameter of their own, behind pooling: as many rows as they give.
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 2]
        projector += [Part(name, p.numel(), path=path_of(model, module)) for name, p in own]
    language = None if lm is None else _language(model, lm, notes)
    # Where tokens are pooled, or a picture has several crops, only the prompt tells how many there are.
    visual = vision.tokens - vision.protected if vision is not None and adapter.spec.tower_cut == "slots" else 0
    layout = adapter.layout()
    tile = None if adapter.spec.tile is None else adapter.spec.tile(core.config)
    return ModelShape(
        class_name(model), layout, vision, None, tuple(projector), language, visual, notes=tuple(notes), tile=tile
    )


def _language(model: Any, lm: Any, notes: list[str]) -> LanguageShape | None:
    size = next(lm.parameters()).element_size()
    blocks, kinds = [], layer_kinds(lm.config, len(lm.layers))
    for index, (layer, kind) in enumerate(zip(lm.layers, kinds)):
        block = layer_shape(layer, lm.config, kind, size)
        if block is None:
            parts = ", ".join(name for name, part in layer.named_children() if has_matrices(part))
            what = f"layer {index} of {type(lm).__name__} has parts of another form than those known: {parts}"
            notes.append(f"the language model is not counted ({what})")
            return None
        blocks.append(block)
    # What stands beside the layers (inputs of every layer out of one projection) takes the tokens that enter the first.
    beside = sum(macs for _, _, macs in linear_maps(lm, [lm.layers]))
    blocks[0] = replace(blocks[0], beside=blocks[0].beside + beside)
    late = _late(model, lm, blocks)
    if late is not None:
        blocks = [replace(block, late=block.shared) for block in blocks]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
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
