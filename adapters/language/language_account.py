"""Vision-language models as counts and widths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ...core.model_shape import LanguageShape, ModelShape, Part
from ...errors import UnsupportedModel
from ..account import block_shape, class_name, heads_of, linear_maps, path_of, weights
from ..base import child
from ..towers.tower_account import hf_tower
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
    config = lm.config
    width, count = int(config.hidden_size), int(config.num_attention_heads)
    kv = int(getattr(config, "num_key_value_heads", None) or count)
    blocks = []
    for layer, kind in zip(lm.layers, layer_kinds(config, len(lm.layers))):
        parts: list[Any] = [getattr(layer, name, None) for name in ("self_attn", "mlp")]
        whole = None not in parts and weights(layer) == sum(map(weights, parts))
        mixture = _mixture(layer.mlp) if whole else None
        if not whole or (mixture is None and hasattr(layer.mlp, "experts")):
            what = "layers of another form than attention and one MLP"
            notes.append(f"the language model is not counted ({type(lm).__name__} has {what})")
            return None
        window = int(getattr(config, "sliding_window", None) or 0) if kind == "sliding_attention" else 0
        block = replace(block_shape(layer.self_attn, layer.mlp, width, count, kv), window=window)
        blocks.append(block if mixture is None else replace(block, mlp=mixture[0], hidden=mixture[1]))
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = None
    if output is not None:
        head = Part("lm_head", weights(output), path=path_of(model, output))
    size = next(lm.parameters()).element_size()
    return LanguageShape(tuple(blocks), head, 2 * kv * blocks[0].head_width * size)


def _mixture(mlp: Any) -> tuple[int, int] | None:
    """MACs of one token in a mixture of experts, and the hidden channels that it passes; None for any other MLP.

    A token passes the router, the `top_k` experts that it picks, and what the mixture has beside them. Experts are
    `[E, rows, columns]` parameters, the router has a weight `[E, C]`.
    """
    experts: Any = getattr(mlp, "experts", None)
    router: Any = getattr(mlp, "gate", None)
    down, score = getattr(experts, "down_proj", None), getattr(router, "weight", None)
    if not isinstance(down, Tensor) or down.dim() != 3 or not isinstance(score, Tensor) or not hasattr(router, "top_k"):
        return None
    picked = int(router.top_k)
    each = sum(part.numel() // part.shape[0] for part in experts.parameters() if part.dim() == 3)
    beside: list[Any] = [module for path, module, _ in linear_maps(mlp) if path.endswith("down_proj")]
    scoring = 0 if hasattr(router, "in_features") else score.numel()  # a linear router is among the linear maps
    hidden = picked * int(down.shape[2]) + sum(int(module.in_features) for module in beside)
    return picked * each + scoring + weights(mlp), hidden
