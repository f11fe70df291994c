"""Vision-language models as counts and widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...core.model_shape import LanguageShape, ModelShape, PackedTowerShape, Part, TowerShape, Uncounted
from ...errors import UnsupportedModel
from ..account import block_shape, class_name, heads_of, linear_maps, path_of, weights
from ..base import child
from ..towers.packed_account import packed_tower
from ..towers.tower_account import hf_tower
from .masks import layer_kinds


def of_hf_vlm(adapter: Any) -> ModelShape:
    """A vision-language model of transformers."""
    model, core, lm = adapter.model, adapter.core, adapter.lm
    uncounted: list[Uncounted] = []
    path = adapter.spec.projector
    vision, packed = _vision(adapter, uncounted)
    projector: list[Part] = []
    if path and (vision is not None or packed is not None):
        module = child(core, path)
        projector = heads_of(model, module)
        # Some multiply by a parameter of their own, behind pooling: as many rows as they give.
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 2]
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
    )


def _vision(adapter: Any, uncounted: list[Uncounted]) -> tuple[TowerShape | None, PackedTowerShape | None]:
    """The vision tower in one of its two forms; neither, with the reason, where it is not known."""
    from ..towers.hf_rows import vision_spec

    model, core = adapter.model, adapter.core
    path = ""
    try:
        tower = child(core, adapter.spec.tower)
        path = path_of(model, tower)
        around = [child(core, adapter.spec.projector)] if adapter.spec.projector else []
        packed = packed_tower(model, tower, core.config, around)
        if packed is not None:
            return None, packed
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
            why = f"the language model is not counted ({type(lm).__name__} has {what})"
            uncounted.append(Uncounted(why, path_of(model, lm)))
            return None
        window = int(getattr(config, "sliding_window", None) or 0) if kind == "sliding_attention" else 0
        block = replace(block_shape(layer.self_attn, layer.mlp, width, count, kv), window=window)
        blocks.append(block if mixture is None else replace(block, mlp=mixture[0], hidden=mixture[1]))
    output = _output(model)
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
