"""Models as counts and widths: MACs are read off the weights, so that a new family needs no formula of its own.

A token costs one MAC per weight of every linear map that it passes. Blocks are split where `BlockSpec` says attention
and MLP are; what stands outside the blocks (patch embedding, pooling, heads, projector) is a `Part` with a path, and a
hook on it books how many rows it really saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..core.model_shape import BlockShape, Part, TowerShape
from .base import BlockSpec, TextSpec, TowerSpec, child


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
        elif is_linear(found) and not any(is_linear(below) for below in found.modules() if below is not found):
            yield path, found, int(found.in_features) * int(found.out_features)


def is_linear(module: Any) -> bool:
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


def class_name(model: nn.Module) -> str:
    """What a model is called in a report."""
    return type(model).__name__


# ---------------------------------------------------------------------- blocks and towers
def head_width(attn: Any, width: int, heads: int) -> int:
    """Width of a head: as the attention has it, for configurations may name several; else its part of the row's."""
    return int(getattr(attn, "head_dim", width // heads))


def block_shape(attn: nn.Module, mlp: nn.Module, width: int, heads: int, kv_heads: int | None = None) -> BlockShape:
    """A block from its two halves."""
    last = next((module for _, module, _ in reversed(list(linear_maps(mlp)))), None)
    hidden = int(getattr(last, "in_features", width))
    return BlockShape(
        width, heads, head_width(attn, width, heads), kv_heads or heads, weights(attn), weights(mlp), hidden
    )


def block_shapes(spec: BlockSpec, blocks: Iterable[nn.Module], width: int) -> tuple[BlockShape, ...]:
    """The blocks of a tower."""
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
    embedded = weights(stem) if stem is not None and is_linear(stem) else 0 if weight is None else weight.numel()
    return TowerShape(
        blocks=block_shapes(spec.block, spec.blocks, spec.width),
        tokens=spec.num_prefix + patches,
        protected=spec.num_prefix,
        stem=embedded,
        parts=tuple(parts),
        recomputed=spec.block.q is None,
        fused=getattr(child(spec.blocks[0], spec.block.attn), "qkv", None) is not None,
        grid=spec.grid,
        first=path_of(model, spec.blocks[0]),
        spread=spec.returns_grid,
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
        blocks=block_shapes(spec.block, spec.blocks, spec.width),
        tokens=tokens,
        protected=2,  # start and end of text
        parts=tuple(parts),
        recomputed=spec.block.q is None,
        first=path_of(model, spec.blocks[0]),
    )


def heads(model: nn.Module, skip: Iterable[nn.Module]) -> list[Part]:
    """Every linear map of a model but those below `skip`, as a part each."""
    return [Part(path, macs, path=path) for path, _, macs in linear_maps(model, skip)]


def heads_of(model: nn.Module, module: nn.Module) -> list[Part]:
    """The linear maps below one module of a model, with paths of the model."""
    path = path_of(model, module)
    return [Part(f"{path}.{p.path}".rstrip("."), p.row, path=f"{path}.{p.path}".rstrip(".")) for p in heads(module, ())]


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


def latent_pool(name: str, pool: Any, path: str, skip: int = 0) -> Part:
    """timm's attention pooling: learned queries (`AttentionPoolLatent`), or none but the tokens themselves (`Prr`).

    Args:
        name: of the part.
        pool: the pooling.
        path: of the module.
        skip: tokens in front that learned queries do not see.
    """
    inner = int(pool.num_heads) * int(pool.head_dim)
    if not hasattr(pool, "kv"):
        return Part(name, 0, 0, 2 * inner, path)
    queries, linear = int(pool.latent_len), weights(pool.kv)
    token = linear + 2 * queries * inner
    return Part(name, queries * (weights(pool) - linear) - skip * token, token, 0, path)
