"""Blocks of towers that pack pictures of any size, as data: where q, k and the rotary table of a row are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .. import forms, hosts
from ..base import BlockSpec
from ..hosts import Host

_ROWS, _HEADS = "apply_rotary_pos_emb_vision", "apply_rotary_pos_emb"
"""The hosts' own functions that turn q and k: of rows `[L, H, d]`, and of `[B, H, L, d]`."""
_PLACES, _TILES = "apply_multidimensional_rope", "vision_apply_rotary_emb"
"""The same by the places of patches, `[B, L, H, d]`, and by complex numbers."""


def _thirds(attn: Host, made: Tensor, which: str) -> Tensor:
    """q or k, `[B, H, L, d]`, out of one projection for q, k and v, `[B, L, 3 C]`."""
    part = made.chunk(3, -1)["qk".index(which)]
    return part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _fused(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """q or k of an attention with one projection for q, k and v."""
    if "fused" not in shared:
        shared["fused"] = attn.qkv(x)
    return _thirds(attn, shared["fused"], which)


def _apart(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """q or k of an attention with q_proj and k_proj."""
    made: Tensor = (attn.q_proj if which == "q" else attn.k_proj)(x)
    return made.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _normed(attn: Host, made: Tensor, which: str) -> Tensor:
    """q or k, `[B, H, L, d]`, of Gemma 4, which norms them head by head; k has a head for each of q."""
    rows = made.unflatten(-1, (-1, attn.head_dim))
    heads: Tensor = (attn.q_norm if which == "q" else attn.k_norm)(rows).transpose(1, 2)
    return heads if which == "q" else heads.repeat_interleave(attn.num_key_value_groups, 1)


def _normed_apart(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """The same from the attention's input."""
    return _normed(attn, (attn.q_proj if which == "q" else attn.k_proj)(x), which)


def _turned_rows(attn: Host, table: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """The rotation of rows `[L, H, d]` by the host's own function, for `[1, H, L, d]`."""
    turn = forms.beside(attn, _ROWS)

    def rotate(x: Tensor) -> Tensor:
        rows = x[0].transpose(0, 1)
        turned: Tensor = turn(rows, rows, *table)[0]
        return turned.transpose(0, 1)[None]

    return rotate


def _turned_heads(attn: Host, table: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """The same where the host's function takes `[B, H, L, d]` as it is."""
    turn = forms.beside(attn, _HEADS)

    def rotate(x: Tensor) -> Tensor:
        turned: Tensor = turn(x, x, *table, unsqueeze_dim=0)[0]
        return turned

    return rotate


def _turned_places(attn: Host, table: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """The rotation of Gemma 4, in two dimensions, for the rows of all pictures side by side."""
    turn = forms.beside(attn, _PLACES)
    cos, sin = (part.flatten(0, 1)[None] for part in table)
    axes = cos.new_empty(0, 2)  # of the places, only the number of coordinates is read

    def rotate(x: Tensor) -> Tensor:
        turned: Tensor = turn(x.transpose(1, 2), cos, sin, axes)
        return turned.transpose(1, 2)

    return rotate


def _turned_tiles(attn: Host, table: Tensor) -> Callable[[Tensor], Tensor]:
    """The rotation of Llama 4: one table of complex numbers for every tile."""
    turn = forms.beside(attn, _TILES)

    def rotate(x: Tensor) -> Tensor:
        tiles = x[0].transpose(0, 1).unflatten(0, (-1, len(table)))
        turned: Tensor = turn(tiles, tiles, freqs_ci=table)[0]
        return turned.flatten(0, 1).transpose(0, 1)[None]

    return rotate


QWEN_BLOCK = BlockSpec(
    norm="norm1",
    attn="attn",
    mid="norm2",
    branch_end="mlp",
    mlp="mlp",
    project=_fused,
    scale=lambda attn: float(attn.scaling),
    heads="num_heads",
    bias=None,
    forms=tuple(
        f"transformers.models:{name}"
        for name in (
            "VisionAttention",
            "Qwen2_5_VLVisionAttention",
            "Qwen3VLVisionAttention",
            "Qwen3VLMoeVisionAttention",
            "Qwen3_5VisionAttention",
            "Qwen3_5MoeVisionAttention",
            "Glm4vVisionAttention",
            "Glm4vMoeVisionAttention",
        )
    ),
    q="qkv",
    k="qkv",
    split=_thirds,
    rope=hosts.ROTARY,
    rotate=_turned_rows,
    bounds=hosts.BOUNDS,
    longest=hosts.LONGEST,
    by_name=True,
    functions=(_ROWS,),
)
PADDLE_BLOCK = replace(
    QWEN_BLOCK,
    norm="layer_norm1",
    attn="self_attn",
    mid="layer_norm2",
    project=_apart,
    forms=("transformers.models:PaddleOCRVisionAttention",),
    q="q_proj",
    k="k_proj",
    split=None,
)
PIXTRAL_BLOCK = replace(
    PADDLE_BLOCK,
    norm="attention_norm",
    attn="attention",
    mid="ffn_norm",
    branch_end="feed_forward",
    mlp="feed_forward",
    bias=hosts.BIAS,
    forms=("transformers.models:PixtralAttention",),
    rotate=_turned_heads,
    bounds=None,
    longest=None,
    by_name=False,
    functions=(_HEADS,),
)
SIGLIP2_BLOCK = BlockSpec(
    norm="layer_norm1",
    attn="self_attn",
    mid="layer_norm2",
    branch_end="mlp",
    mlp="mlp",
    project=_apart,
    scale=lambda attn: float(attn.scale),
    heads="num_heads",
    bias=hosts.BIAS,
    forms=("transformers.models:Siglip2Attention",),
    q="q_proj",
    k="k_proj",
)
GEMMA_BLOCK = replace(
    SIGLIP2_BLOCK,
    norm="input_layernorm",
    mid="pre_feedforward_layernorm",
    branch_end="post_feedforward_layernorm",
    project=_normed_apart,
    scale=lambda attn: float(attn.scaling),
    heads="config.num_attention_heads",
    forms=("transformers.models:Gemma4VisionAttention",),
    split=_normed,
    rope=hosts.ROTARY,
    rotate=_turned_places,
    functions=(_PLACES,),
)
LLAMA_BLOCK = replace(
    SIGLIP2_BLOCK,
    norm="input_layernorm",
    mid="post_attention_layernorm",
    scale=lambda attn: float(attn.scaling),
    bias=None,
    forms=("transformers.models:Llama4VisionAttention",),
    rope=hosts.TURNS,
    rotate=_turned_tiles,
    functions=(_TILES,),
)
