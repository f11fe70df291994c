"""Vision towers of transformers as data. A family is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModel
from .. import forms, hosts
from ..base import AttentionPool, BlockSpec, Host, MeanPool, TextSpec, TowerSpec, child
from .pooling import mean_of

if TYPE_CHECKING:
    from ...core.attachment import Attachment


def _project(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """q or k of an attention with q_proj and k_proj."""
    made: Tensor = (attn.q_proj if which == "q" else attn.k_proj)(x)
    return made.unflatten(-1, (made.shape[-1] // attn.head_dim, -1)).transpose(1, 2)


_BLOCK: dict[str, Any] = {
    "project": _project,
    "bias": hosts.BIAS,
    "q": "q_proj",
    "k": "k_proj",
    "mlp": "mlp",
}

CLIP_BLOCK = BlockSpec(
    **_BLOCK,
    forms=(
        "transformers.models:CLIPAttention",
        "transformers.models:SiglipAttention",
        "transformers.models:Idefics3VisionAttention",
        "transformers.models:SmolVLMVisionAttention",
        "transformers.models:JanusVisionAttention",
    ),
    norm="layer_norm1",
    attn="self_attn",
    mid="layer_norm2",
    branch_end="mlp",
    heads="num_heads",
    scale=lambda attn: float(attn.scale),
)

VIT_BLOCK = BlockSpec(
    **_BLOCK,
    forms=("transformers.models:ViTAttention",),
    norm="layernorm_before",
    attn="attention",
    mid="layernorm_after",
    branch_end="mlp",
    heads="num_attention_heads",
    scale=lambda attn: float(attn.scaling),
)

DINOV2_BLOCK = BlockSpec(
    **_BLOCK,
    forms=("transformers.models:Dinov2Attention",),
    norm="norm1",
    attn="attention",
    mid="norm2",
    branch_end="layer_scale2",
    heads="num_attention_heads",
    scale=lambda attn: float(attn.scaling),
)


def _split(attn: Host, made: Tensor, which: str) -> Tensor:
    """q or k out of one projection for q, k and v."""
    part = made.chunk(3, -1)["qk".index(which)]
    return part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _fused(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """q or k of an attention with one projection for q, k and v."""
    if "fused" not in shared:
        shared["fused"] = attn.qkv(x)
    return _split(attn, shared["fused"], which)


def _normed(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """q or k of an attention that norms them over all heads together."""
    made = (attn.q_proj if which == "q" else attn.k_proj)(x)
    made = (attn.q_norm if which == "q" else attn.k_norm)(made)
    return made.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


BLIP2_BLOCK = replace(
    CLIP_BLOCK,
    project=_fused,
    q="qkv",
    k="qkv",
    split=_split,
    bias=None,
    by_name=True,
    forms=(
        "transformers.models:Blip2Attention",
        "transformers.models:InstructBlipAttention",
        "transformers.models:InstructBlipVideoAttention",
    ),
)

INTERNVL_BLOCK = replace(
    VIT_BLOCK,
    forms=("transformers.models:InternVLVisionAttention", "transformers.models:QianfanOCRVisionAttention"),
    project=_normed,
    q="q_norm",
    k="k_norm",
    heads="num_heads",
    scale=lambda attn: float(attn.scale),
    through=True,  # a learned factor follows the MLP
)


@dataclass(frozen=True)
class VisionRow:
    """One family of vision models.

    Attributes:
        layer: class name of its blocks, which finds them wherever a version keeps them.
        block: hook points.
        num_prefix: protected tokens in front.
        padded: whether its host hides patches of padding.
    """

    layer: str
    block: BlockSpec
    num_prefix: int
    padded: bool = False


ROWS: dict[str, VisionRow] = {
    "clip_vision_model": VisionRow("CLIPEncoderLayer", CLIP_BLOCK, 1),
    "siglip_vision_model": VisionRow("SiglipEncoderLayer", CLIP_BLOCK, 0),
    "vit": VisionRow("ViTLayer", VIT_BLOCK, 1),
    "dinov2": VisionRow("Dinov2Layer", DINOV2_BLOCK, 1),
    "blip_2_vision_model": VisionRow("Blip2EncoderLayer", BLIP2_BLOCK, 1),
    "instructblip_vision_model": VisionRow("InstructBlipEncoderLayer", BLIP2_BLOCK, 1),
    "instructblipvideo_vision_model": VisionRow("InstructBlipVideoEncoderLayer", BLIP2_BLOCK, 1),
    "internvl_vision": VisionRow("InternVLVisionLayer", INTERNVL_BLOCK, 1),
    "qianfan_ocr_vision": VisionRow("QianfanOCRVisionLayer", INTERNVL_BLOCK, 1),
    "janus_vision_model": VisionRow("JanusVisionEncoderLayer", CLIP_BLOCK, 0),
    "idefics3_vision": VisionRow("Idefics3EncoderLayer", CLIP_BLOCK, 0, padded=True),
    "smolvlm_vision": VisionRow("SmolVLMEncoderLayer", CLIP_BLOCK, 0, padded=True),
}
"""By ``config.model_type``."""


def _pair(value: Any) -> tuple[int, int] | None:
    """A size as (rows, columns)."""
    if isinstance(value, int):
        return (value, value)
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) and len(value) == 2 else None


def vision_spec(tower: Host, last: int = -1) -> TowerSpec:
    """A vision model of transformers as data.

    Args:
        tower: the model, or the tower of a bigger one.
        last: the last block whose output is used.

    Raises:
        UnsupportedModel: no row for its type.
    """
    config = getattr(tower.config, "vision_config", tower.config)
    row = ROWS.get(config.model_type)
    if row is None:
        raise UnsupportedModel(f"no vision tower {config.model_type!r} is carried; carried: {', '.join(ROWS)}")
    blocks = forms.known_blocks(tower, row.layer)
    side = None
    size, patch = _pair(getattr(config, "image_size", None)), _pair(getattr(config, "patch_size", None))
    if size and patch:
        side = (size[0] // patch[0], size[1] // patch[1])
    return TowerSpec(
        block=row.block,
        blocks=blocks,
        num_prefix=row.num_prefix,
        width=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        grid=side,
        stem=next((module for module in tower.modules() if isinstance(module, nn.Conv2d)), None),
        last=last,
        masked=True,
        padded=row.padded,
    )


def _of_patches(skip: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The mean of a row without its first tokens."""
    return lambda tokens, size: mean_of(tokens[:, skip:], None if size is None else size[:, skip:])


def _class_and_patches(tokens: Tensor, size: Tensor | None) -> Tensor:
    """DINOv2's: the class token, then the mean of the patches."""
    return torch.cat([tokens[:, 0], _of_patches(1)(tokens, size)], dim=1)


_MEANS: dict[str, tuple[str, Callable[[Tensor, Tensor | None], Tensor]]] = {
    "CLIPForImageClassification": ("vision_model", _of_patches(1)),
    "SiglipForImageClassification": ("vision_model", _of_patches(0)),
    "Dinov2ForImageClassification": ("dinov2", _class_and_patches),
}
"""Classifiers whose head reads a mean: the part that gives the tokens, and what the head reads of them."""


def pools_of(model: Host, tower: Host) -> tuple[MeanPool | AttentionPool, ...]:
    """Where a model of transformers pools its tower's tokens, and sizes can count.

    Args:
        model: the tower, a classifier around it, or a dual encoder.
        tower: the module that holds the blocks.
    """
    found: list[MeanPool | AttentionPool] = []
    for name, (part, make) in _MEANS.items():
        if forms.known(model, (f"transformers.models:{name}",)):
            found.append(MeanPool(model, child(model, part), model.classifier, make))
    for module in tower.modules():
        if forms.known(module, ("transformers.models:SiglipMultiheadAttentionPoolingHead",)):
            inside = next(m for m in tower.modules() if any(part is module for part in m.children()))
            found.append(AttentionPool(inside, child(module, "attention"), hosts.KEY_BIAS))
    return tuple(found)


def check_bias(spec: TowerSpec, attachment: Attachment) -> None:
    """Refuses proportional attention where the attention takes no bias on the keys.

    Raises:
        UnsupportedModel: flash attention, or one of the user's own, with a proportional method.
    """
    kind = forms.unbiased(child(spec.blocks[0], spec.block.attn))
    asking = [type(e.method).__name__ for e in attachment.at("vision") if e.method.proportional]
    if asking and kind:
        raise UnsupportedModel(
            f"{asking[0]} wants proportional attention, but {kind} takes no bias on the keys; load the model with "
            "attn_implementation='sdpa' (or 'eager', 'flex_attention'), or switch proportional attention off in "
            "the method"
        )


def text_spec(model: nn.Module) -> TextSpec | None:
    """CLIP's text tower as data; SigLIP's has no causal mask and reads its last token, which may be padding."""
    text = getattr(model, "text_model", None)
    if text is None or text.config.model_type != "clip_text_model":
        return None
    blocks = forms.known_blocks(text, "CLIPEncoderLayer")
    eos = text.config.eos_token_id

    def end(ids: Tensor) -> Tensor:
        # An eos id of 2 stands in old configs; the host then reads the highest id.
        return ids.argmax(1) if eos == 2 else (ids == eos).to(torch.int64).argmax(1)

    return TextSpec(
        block=CLIP_BLOCK,
        blocks=blocks,
        ids=text,
        norm=text.final_layer_norm,
        width=int(text.config.hidden_size),
        heads=int(text.config.num_attention_heads),
        mask=hosts.BIAS,
        end=end,
    )
