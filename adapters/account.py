"""Models as counts and widths: MACs are read off the weights, so that a new family needs no formula of its own.

A token costs one MAC per weight of every linear map that it passes. Blocks are split where `BlockSpec` says attention
and MLP are; what stands outside the blocks (patch embedding, pooling, heads, projector) is a `Part` with a path, and a
hook on it books how many rows it really saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attachment import replaying
from ..errors import UnsupportedModel
from ..flops import BlockShape, LanguageShape, ModelShape, Part, TowerShape
from ..ledger import StageRun
from . import forms, hosts
from .base import Adapter, BlockSpec, TextSpec, TowerSpec, child
from .hosts import Arguments
from .masks import layer_kinds

if TYPE_CHECKING:
    from ..attachment import Attachment


# ---------------------------------------------------------------------- weights
def linear_maps(module: nn.Module, skip: Iterable[nn.Module] = ()) -> Iterator[tuple[str, Any, int]]:
    """Linear maps below a module: (path, module, MACs of one input row).

    Quantised and low-rank layers count by their features, not by how their weights are stored.

    Args:
        module: where to look.
        skip: modules below which not to look.
    """
    hidden = {id(below) for other in skip for below in other.modules()}
    for path, found in module.named_modules():
        if id(found) in hidden:
            continue
        if isinstance(found, nn.MultiheadAttention):  # its output projection is a linear map of its own
            yield path, found, sum(w.numel() for w in _packed(found))
        elif _linear(found) and not any(_linear(below) for below in found.modules() if below is not found):
            yield path, found, int(found.in_features) * int(found.out_features)


def _linear(module: Any) -> bool:
    """Whether it is a linear map; quantised ones keep their weights in a module below."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _packed(attn: nn.MultiheadAttention) -> list[Tensor]:
    given = (attn.in_proj_weight, attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
    return [weight for weight in given if weight is not None]


def weights(module: nn.Module) -> int:
    """MACs of one token in all linear maps of a module."""
    return sum(macs for _, _, macs in linear_maps(module))


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted path of a module in its model."""
    return next(path for path, found in model.named_modules() if found is module)


# ---------------------------------------------------------------------- blocks and towers
def block_shape(attn: nn.Module, mlp: nn.Module, width: int, heads: int, kv_heads: int | None = None) -> BlockShape:
    """A block from its two halves."""
    last = next((module for _, module, _ in reversed(list(linear_maps(mlp)))), None)
    head_width = int(getattr(attn, "head_dim", width // heads))
    hidden = int(getattr(last, "in_features", width))
    return BlockShape(width, heads, head_width, kv_heads or heads, weights(attn), weights(mlp), hidden)


def _blocks(spec: BlockSpec, blocks: Iterable[nn.Module], width: int) -> tuple[BlockShape, ...]:
    made = []
    for block in blocks:
        attn = child(block, spec.attn)
        made.append(block_shape(attn, child(block, spec.mlp), width, int(getattr(attn, spec.heads))))
    return tuple(made)


def tower_shape(model: nn.Module, spec: TowerSpec, stem: nn.Module | None, parts: Iterable[Part]) -> TowerShape:
    """A vision tower.

    Args:
        model: the model whose paths count.
        spec: the tower as data.
        stem: its patch embedding, a convolution or a linear map, or None.
        parts: what stands behind the blocks.
    """
    patches = 0 if spec.grid is None else spec.grid[0] * spec.grid[1]
    weight = getattr(stem, "weight", None)
    return TowerShape(
        blocks=_blocks(spec.block, spec.blocks, spec.width),
        tokens=spec.num_prefix + patches,
        protected=spec.num_prefix,
        stem=0 if weight is None else weight.numel(),
        parts=tuple(parts),
        recomputed=spec.block.q is None,
        fused=getattr(child(spec.blocks[0], spec.block.attn), "qkv", None) is not None,
        grid=spec.grid,
        first=path_of(model, spec.blocks[0]),
        spread=spec.spread,
    )


def text_shape(model: nn.Module, spec: TextSpec, tokens: int, parts: Iterable[Part]) -> TowerShape:
    """A text tower that methods can shorten.

    Args:
        model: the model whose paths count.
        spec: the tower as data.
        tokens: its context length.
        parts: what stands behind the blocks.
    """
    return TowerShape(
        blocks=_blocks(spec.block, spec.blocks, spec.width),
        tokens=tokens,
        protected=2,  # start and end of text
        parts=tuple(parts),
        recomputed=spec.block.q is None,
        first=path_of(model, spec.blocks[0]),
    )


def heads(model: nn.Module, skip: Iterable[nn.Module]) -> list[Part]:
    """Every linear map of a model but those below `skip`, as a part each."""
    return [Part(path, macs, path=path) for path, _, macs in linear_maps(model, skip)]


# ---------------------------------------------------------------------- attention pooling
def multihead_pool(name: str, attn: nn.MultiheadAttention, queries: int, rest: int, path: str) -> Part:
    """Pooling by nn.MultiheadAttention: some learned queries attend to all tokens.

    Args:
        name: of the part.
        attn: the attention; keys and values may have a width of their own.
        queries: how many.
        rest: MACs of each query behind the attention.
        path: of the module.
    """
    width = attn.embed_dim
    row = queries * (2 * width * width + rest)
    return Part(name, row, width * ((attn.kdim or width) + (attn.vdim or width)) + 2 * queries * width, 0, path)


def latent_pool(name: str, pool: Any, path: str) -> Part:
    """timm's attention pooling: learned queries (`AttentionPoolLatent`), or none but the tokens themselves (`Prr`)."""
    inner = int(pool.num_heads) * int(pool.head_dim)
    if not hasattr(pool, "kv"):
        return Part(name, 0, 0, 2 * inner, path)
    queries, token = int(pool.latent_len), weights(pool.kv)
    return Part(name, queries * (weights(pool) - token), token + 2 * queries * inner, 0, path)


# ---------------------------------------------------------------------- families
def of_timm(adapter: Any, prefix: str = "", model: nn.Module | None = None) -> ModelShape:
    """timm's VisionTransformer and Eva.

    Args:
        adapter: of the trunk.
        prefix: path of the trunk in `model`, with a dot behind.
        model: the model around the trunk, if there is one.
    """
    trunk, spec = adapter.model, adapter.tower()
    pool = getattr(trunk, "attn_pool", None)
    parts = [] if pool is None else [latent_pool("pool", pool, f"{prefix}attn_pool")]
    outside = [trunk.patch_embed, *spec.blocks, *([] if pool is None else [pool])]
    parts += [Part(part.name, part.row, path=prefix + part.path) for part in heads(trunk, outside)]
    stem = getattr(trunk.patch_embed, "proj", None)
    notes = []
    if hasattr(trunk.patch_embed, "backbone"):
        notes = ["the convolutions in front of the patch embedding are not counted"]
    tower = tower_shape(model or trunk, spec, stem, parts)
    return ModelShape(_name(model or trunk), adapter.layout(), tower, notes=tuple(notes))


def of_open_clip_tower(adapter: Any, prefix: str = "", model: nn.Module | None = None) -> ModelShape:
    """open_clip's VisionTransformer; arguments as in `of_timm`."""
    tower, spec = adapter.model, adapter.tower()
    parts = []
    pool, second = tower.attn_pool, getattr(tower, "attn_pool_contrastive", None)
    if pool is not None:
        queries = int(pool.query.shape[0])
        parts.append(multihead_pool("pool", pool.attn, queries, 0, f"{prefix}attn_pool"))
        if second is not None:
            path = f"{prefix}attn_pool_contrastive"
            part = multihead_pool("contrastive pool", second.attn, int(second.query.shape[0]), 0, path)
            if tower.attn_pool_type == "cascade":  # it pools what the first one leaves
                part = Part(part.name, part.macs(1, queries), path=path)
            parts.append(part)
    if tower.proj is not None:
        parts.append(Part("projection", tower.proj.numel()))
    shape = tower_shape(model or tower, spec, tower.conv1, parts)
    return ModelShape(_name(model or tower), adapter.layout(), shape)


def of_open_clip_timm(adapter: Any, prefix: str = "", model: nn.Module | None = None) -> ModelShape:
    """open_clip's TimmModel: the trunk, and the head behind it."""
    outer = adapter.model
    shape = of_timm(adapter.inner, f"{prefix}trunk.", model or outer)
    assert shape.vision is not None
    head = [Part(p.name, p.row, path=f"{prefix}head.{p.path}".rstrip(".")) for p in heads(outer.head, ())]
    vision = replace(shape.vision, parts=(*shape.vision.parts, *head))
    return ModelShape(shape.name, adapter.layout(), vision, notes=shape.notes)


def of_open_clip(adapter: Any) -> ModelShape:
    """A dual encoder of open_clip."""
    model = adapter.model
    inner = of_open_clip_timm if hasattr(adapter.vision, "inner") else of_open_clip_tower
    seen = inner(adapter.vision, "visual.", model)
    text, notes = None, list(seen.notes)
    if adapter.text is not None:
        tower = getattr(model, "text", model)
        projection = getattr(tower, "text_projection", None)
        parts = []
        if projection is not None and _linear(projection):
            parts = [Part("text projection", weights(projection), path=path_of(model, projection))]
        elif projection is not None:
            parts = [Part("text projection", projection.numel())]
        text = text_shape(model, adapter.text, int(tower.context_length), parts)
    else:
        notes.append("the text tower is not counted")
    if hasattr(model, "text_decoder"):
        notes.append("the multimodal decoder is not counted")
    return ModelShape(_name(model), adapter.layout(), seen.vision, text, notes=tuple(notes))


def of_hf_vision(adapter: Any) -> ModelShape:
    """A vision model of transformers, alone or in a dual encoder."""
    model, tower = adapter.model, adapter.vision()
    beside = [getattr(model, name, None) for name in ("text_model", "text_projection")]
    around = [module for module in beside if module is not None]
    vision = hf_tower(model, model, adapter.tower(), tower, around)
    return ModelShape(_name(model), adapter.layout(), vision, _hf_text(model, around))


def _hf_text(model: Any, parts: list[nn.Module]) -> TowerShape | None:
    """The text tower of a dual encoder; its blocks are those of the family's vision tower.

    Args:
        model: the dual encoder.
        parts: the text model, and the projection behind it if there is one.
    """
    from .hf_vit import ROWS, text_spec

    if not parts:
        return None
    text: Any = parts[0]
    rows = [row for row in ROWS.values() if forms.blocks_of(text, row.layer)]
    blocks = forms.blocks_of(text, rows[0].layer)
    others = [module for module in model.children() if module not in parts]
    return TowerShape(
        blocks=_blocks(rows[0].block, blocks, int(text.config.hidden_size)),
        tokens=int(text.config.max_position_embeddings),
        protected=0 if text_spec(model) is None else 2,  # start and end of text
        parts=tuple(heads(model, [*others, *blocks])),
        first=path_of(model, blocks[0]),
    )


def heads_of(model: nn.Module, module: nn.Module) -> list[Part]:
    """The linear maps below one module of a model, with paths of the model."""
    path = path_of(model, module)
    return [Part(f"{path}.{p.path}".rstrip("."), p.row, path=f"{path}.{p.path}".rstrip(".")) for p in heads(module, ())]


def hf_tower(
    model: nn.Module, top: nn.Module, spec: TowerSpec, tower: nn.Module, around: Iterable[nn.Module]
) -> TowerShape:
    """A vision tower of transformers.

    Args:
        model: where parts are looked for.
        top: the model whose paths count.
        spec: the tower as data.
        tower: the module that holds it.
        around: modules of `model` that are no part of the tower.
    """
    stem = next((m for m in tower.modules() if isinstance(m, nn.Conv2d)), None)
    pools: list[Any] = [
        m
        for m in tower.modules()
        if hasattr(m, "probe") and isinstance(getattr(m, "attention", None), nn.MultiheadAttention)
    ]
    parts = [
        multihead_pool("pool", p.attention, int(p.probe.shape[1]), weights(p) - weights(p.attention), path_of(top, p))
        for p in pools
    ]
    prefix = path_of(top, model)
    skip = [*spec.blocks, *pools, *around]
    for part in heads(model, skip):
        path = f"{prefix}.{part.path}" if prefix else part.path
        parts.append(Part(path, part.row, path=path))
    return tower_shape(top, spec, stem, parts)


def of_hf_vlm(adapter: Any) -> ModelShape:
    """A vision-language model of transformers."""
    from .hf_vit import vision_spec

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
    return ModelShape(_name(model), layout, vision, None, tuple(projector), language, visual, notes=tuple(notes))


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


def _name(model: nn.Module) -> str:
    return type(model).__name__


# ---------------------------------------------------------------------- what ran outside the blocks
class Meter:
    """Books the rows that modules outside the blocks saw, and passes through towers that no method touches."""

    def __init__(self, attachment: Attachment, model: nn.Module, shape: ModelShape) -> None:
        self.attachment = attachment
        self.places: list[tuple[str, Part]] = []
        self.stages: list[str] = []
        self.blocks: list[Arguments] = []
        for stage, tower in (("vision", shape.vision), ("text", shape.text)):
            if tower is None:
                continue
            if not attachment.at(stage) and not attachment.tapped(stage):
                first = model.get_submodule(tower.first)
                self.blocks.append(Arguments(first, [hosts.HIDDEN]))
                attachment.hook(first, "pre", self.begin, len(self.stages))
                self.stages.append(stage)
            for part in tower.parts:
                self._put(model, stage, part)
        for part in shape.projector:
            self._put(model, "vision", part)
        if shape.language is not None and shape.language.head is not None:
            self._put(model, "decoder", shape.language.head)

    def _put(self, model: nn.Module, stage: str, part: Part) -> None:
        if part.path:
            self.attachment.hook(model.get_submodule(part.path), "post", self.note, len(self.places))
            self.places.append((stage, part))

    def begin(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on a tower's first block."""
        if torch.compiler.is_compiling() or replaying():
            return
        x = self.blocks[place].get(hosts.HIDDEN, args, kwargs)
        self.attachment.ledger.begin(StageRun(self.stages[place], x.shape[0], x.shape[1]))

    def note(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook on a part."""
        if torch.compiler.is_compiling() or replaying():
            return
        stage, part = self.places[place]
        x = hosts.first_tensor(module, args, kwargs)
        if part.token or part.pair:
            rows = x.shape[0]
        else:
            # What is no linear map itself multiplies what it gives.
            seen = x if hasattr(module, "in_features") else output[0] if isinstance(output, tuple) else output
            rows = seen.numel() // seen.shape[-1]
        self.attachment.ledger.note(stage, part.name, rows)


def meter(adapter: Adapter, attachment: Attachment) -> None:
    """Places the hooks that accounting needs; none where the adapter cannot say what its model costs.

    Args:
        adapter: of the model.
        attachment: takes the hooks; its own are in place.
    """
    try:
        shape = adapter.account()
    except NotImplementedError:
        return
    Meter(attachment, adapter.model, shape)
