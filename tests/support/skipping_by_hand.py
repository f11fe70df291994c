"""LLaVA with branches left out for visual tokens, layer by layer; nothing here imports the library.

A row is run whole, without cache or padding: where a branch is left out, its result is set to zero for the visual
tokens of the prompt before it is added.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embedded(model: Any, ids: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The language model's input [L, C], and which columns are visual."""
    core = model.model
    visual = ids == core.config.image_token_id
    x = core.language_model.embed_tokens(ids)
    if pixels is not None:
        states = core.vision_tower(pixels, output_hidden_states=True).hidden_states[core.config.vision_feature_layer]
        x = x.index_put((visual,), core.multi_modal_projector(states[:, 1:]).flatten(0, 1))
    return x, visual


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary embeddings of [H, L, d], positions from 0, the halves of the channels paired."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None].double() * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half].double(), x[..., half:].double()
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def norm(x: Tensor, by: nn.Module) -> Tensor:
    scale = (x.double().square().mean(-1, keepdim=True) + by.variance_epsilon).rsqrt()
    return by.weight * (x.double() * scale).to(x.dtype)


def attention(x: Tensor, attn: Any, theta: float) -> Tensor:
    """What causal attention makes of [L, C]."""
    split = lambda part: part(x).unflatten(-1, (-1, attn.head_dim)).transpose(0, 1)  # noqa: E731
    q, k, v = turned(split(attn.q_proj), theta), turned(split(attn.k_proj), theta), split(attn.v_proj).double()
    k, v = (part.repeat_interleave(len(q) // len(k), 0) for part in (k, v))
    logits = (q @ k.transpose(1, 2) / attn.head_dim**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, -1e30)
    return attn.o_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1).to(x.dtype))


@torch.no_grad()
def logits(
    model: Any, ids: Tensor, pixels: Tensor | None, layers: Collection[int], part: str
) -> tuple[Tensor, list[Tensor]]:
    """Logits [V] behind a row, and the hidden states [L, C] in front of each layer and behind the last.

    Args:
        model: LLaVA.
        ids: [L].
        pixels: of its pictures, or None.
        layers: that skip.
        part: ``ffn``, ``attn`` or ``block``.
    """
    h, visual = embedded(model, ids, pixels)
    lm, found = model.model.language_model, [h]
    for index, layer in enumerate(lm.layers):
        left_out = visual[:, None] if index in layers else torch.zeros(len(h), 1, dtype=torch.bool)
        mixed = attention(norm(h, layer.input_layernorm), layer.self_attn, lm.config.rope_parameters["rope_theta"])
        h = h + (mixed if part == "ffn" else mixed.masked_fill(left_out, 0.0))
        z = norm(h, layer.post_attention_layernorm)
        made = layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(z)) * layer.mlp.up_proj(z))
        h = h + (made if part == "attn" else made.masked_fill(left_out, 0.0))
        found.append(h)
    return model.lm_head(norm(h[-1], lm.norm)), found


def written(
    model: Any, ids: Tensor, pixels: Tensor | None, layers: Collection[int], part: str, tokens: Any
) -> tuple[Tensor, Tensor]:
    """Tokens behind a row and their logits [steps, V]: given ones, or so many of the likeliest.

    Args:
        model: LLaVA.
        ids: [L].
        pixels: of its pictures, or None.
        layers: that skip.
        part: what they skip.
        tokens: int64 [steps], or how many.
    """
    start, found = len(ids), []
    for step in range(tokens if isinstance(tokens, int) else len(tokens)):
        found.append(logits(model, ids, pixels, layers, part)[0])
        following = found[-1].argmax() if isinstance(tokens, int) else tokens[step]
        ids = torch.cat([ids, following[None]])
    return ids[start:], torch.stack(found)
