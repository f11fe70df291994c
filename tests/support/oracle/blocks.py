"""Vision towers of timm, open_clip and transformers in pieces that take one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Block:
    """A pre-norm block, in pieces that take one row."""

    norm1: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    scale: float
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


@dataclass
class Vision:
    """A tower, in pieces.

    Attributes:
        embed: pixels [1, 3, H, W] to tokens [1, L, C].
        blocks: in order.
        prefix: protected tokens.
        tokens: what the library does with the last block's output before it is seen.
        head: from that to what the user gets.
        rope: pixels to (sin, cos) [N, d] each, or None.
        half: rotate halves instead of neighbours.
        grid: of the patches.
        mean: the same as `head` where it reads a mean over the patches, from these and the sizes [L] of its tokens.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: list[Block]
    prefix: int
    tokens: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    rope: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    half: bool = False
    grid: tuple[int, int] | None = None
    mean: Callable[[Tensor, Tensor], Tensor] | None = None

    def answer(self, tokens: Tensor, size: Tensor) -> Tensor:
        """What the user gets, from what is seen of the tokens [1, L, C] and their sizes [L]."""
        return self.head(tokens) if self.mean is None else self.mean(tokens, size)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[L, H d] to [H, L, d]."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def flat(x: Tensor) -> Tensor:
    """[H, L, d] to [L, H d]."""
    return x.transpose(0, 1).flatten(1)


def _fused(weight: Tensor, bias: Tensor | None, heads: int, q_norm: Any = None, k_norm: Any = None) -> Callable:
    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_of(part, heads) for part in F.linear(x, weight, bias).chunk(3, -1))
        return (q if q_norm is None else q_norm(q)), (k if k_norm is None else k_norm(k)), v

    return qkv


def _apart(q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, heads: int, norms: tuple = ()) -> Callable:
    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_of(made(x), heads) for made in (q_proj, k_proj, v_proj))
        return (norms[0](q), norms[1](k), v) if norms else (q, k, v)

    return qkv


def _timm_block(block: nn.Module) -> Block:
    attn = block.attn
    heads, norms = attn.num_heads, (attn.q_norm, attn.k_norm)
    if attn.qkv is None:
        qkv = _apart(attn.q_proj, attn.k_proj, attn.v_proj, heads, norms)
    else:
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = _fused(attn.qkv.weight, bias, heads, *norms)
    scale1 = getattr(block, "ls1", None) or (lambda x: x if block.gamma_1 is None else block.gamma_1 * x)
    scale2 = getattr(block, "ls2", None) or (lambda x: x if block.gamma_2 is None else block.gamma_2 * x)
    return Block(
        block.norm1,
        qkv,
        (attn.proj.in_features // heads) ** -0.5,
        lambda x: scale1(attn.proj(attn.norm(x))),
        block.norm2,
        lambda x: scale2(block.mlp(x)),
    )


def _timm(model: nn.Module) -> Vision:
    naflex = hasattr(model, "embeds")

    def embed(x: Tensor) -> Tensor:
        if naflex:
            return model.norm_pre(model.embeds(x)[0])
        made = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(made[0] if isinstance(made, tuple) else made)

    def rope(x: Tensor) -> tuple[Tensor, Tensor]:
        if naflex:
            return model.rope.get_embed(shape=model.embeds(x)[1]).chunk(2, -1)
        return model._pos_embed(model.patch_embed(x))[1].chunk(2, -1)

    def mean(x: Tensor, size: Tensor) -> Tensor:
        patches, size = x[0, model.num_prefix_tokens :].double(), size[model.num_prefix_tokens :].double()
        each = torch.stack([row * number / size.sum() for row, number in zip(patches, size)])
        return model.head(model.fc_norm(each.sum(0)[None].to(x.dtype)))

    rotary = getattr(model, "rope", None) is not None
    return Vision(
        embed,
        [_timm_block(block) for block in model.blocks],
        int(model.num_prefix_tokens),
        model.norm,
        model.forward_head,
        rope if rotary else None,
        bool(rotary and getattr(model.blocks[0].attn, "rotate_half", False)),
        tuple(model.embeds.pos_embed_grid_size if naflex else model.patch_embed.grid_size),
        mean if model.global_pool == "avg" else None,
    )


def _open_clip_block(block: nn.Module) -> Block:
    attn = block.attn
    return Block(
        block.ln_1,
        _fused(attn.in_proj_weight, attn.in_proj_bias, attn.num_heads),
        (attn.embed_dim // attn.num_heads) ** -0.5,
        lambda x: block.ls_1(F.linear(x, attn.out_proj.weight, attn.out_proj.bias)),
        block.ln_2,
        lambda x: block.ls_2(block.mlp(x)),
    )


def _open_clip(model: nn.Module) -> Vision:
    visual = getattr(model, "visual", model)
    if hasattr(visual, "trunk"):
        inner = _timm(visual.trunk)
        assert inner.mean is None, "the head behind the trunk is not in it"
        inner.head = lambda x: visual.head(visual.trunk.forward_head(x))
        return inner

    def head(x: Tensor) -> Tensor:
        pooled = visual._pool(x)[0] @ visual.proj
        return F.normalize(pooled, dim=-1) if type(model).__name__ == "CoCa" else pooled

    return Vision(
        visual._embeds,
        [_open_clip_block(block) for block in visual.transformer.resblocks],
        1,
        lambda x: x,
        head,
        grid=tuple(visual.grid_size),
    )


def _hf_block(block: nn.Module) -> Block:
    kind = type(block).__name__
    attn = block.self_attn if hasattr(block, "self_attn") else block.attention
    out = next(getattr(attn, name) for name in ("out_proj", "o_proj", "projection") if hasattr(attn, name))
    heads = int(attn.config.num_attention_heads)
    norms = {
        "ViTLayer": ("layernorm_before", "layernorm_after"),
        "Dinov2Layer": ("norm1", "norm2"),
    }.get(kind, ("layer_norm1", "layer_norm2"))
    one = block.layer_scale1 if kind == "Dinov2Layer" else (lambda x: x)
    two = block.layer_scale2 if kind == "Dinov2Layer" else (lambda x: x)
    return Block(
        getattr(block, norms[0]),
        _fused(attn.qkv.weight, attn.qkv.bias, heads)
        if hasattr(attn, "qkv")
        else _apart(attn.q_proj, attn.k_proj, attn.v_proj, heads),
        (int(attn.config.hidden_size) // heads) ** -0.5,
        lambda x: one(out(x)),
        getattr(block, norms[1]),
        lambda x: two(block.mlp(x)),
    )


def hf_tower(model: nn.Module) -> Vision:
    kind = type(model).__name__
    dual = hasattr(model, "vision_model")
    tower = model.vision_model if dual else getattr(model, "vit", model)
    layers = [m for m in tower.modules() if type(m).__name__.endswith("Layer") and hasattr(m, "mlp")]
    blocks = [_hf_block(layer) for layer in layers]
    side = tower.config.image_size // tower.config.patch_size
    if "CLIP" in type(tower).__name__:
        pooled = lambda x: tower.post_layernorm(x[:, 0])  # noqa: E731
        head = (lambda x: model.visual_projection(pooled(x))) if dual else pooled
        return Vision(
            lambda x: tower.pre_layrnorm(tower.embeddings(x)), blocks, 1, lambda x: x, head, grid=(side, side)
        )
    if "Siglip" in type(tower).__name__:
        return Vision(tower.embeddings, blocks, 0, tower.post_layernorm, tower.head, grid=(side, side))
    if "Blip" in type(tower).__name__:
        norm = tower.post_layernorm
        return Vision(tower.embeddings, blocks, 1, norm, lambda x: norm(x[:, 0]), grid=(side, side))
    heads = {
        "ViTModel": lambda x: model.pooler(x),
        "ViTForImageClassification": lambda x: model.classifier(x[:, 0]),
        "Dinov2Model": lambda x: x[:, 0],
    }
    return Vision(tower.embeddings, blocks, 1, tower.layernorm, heads[kind], grid=(side, side))


def vision_of(model: nn.Module) -> Vision:
    """A tower in pieces, by the library that its class comes from."""
    library = type(model).__module__.partition(".")[0]
    return {"timm": _timm, "open_clip": _open_clip, "transformers": hf_tower}[library](model)


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """sin and cos [L, d], halves equal."""
    angle = positions.double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
    angle = torch.cat([angle, angle], -1)
    return angle.sin(), angle.cos()
