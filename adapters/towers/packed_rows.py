"""Towers of transformers that take pictures of any size, or that no method cuts, as data. A family is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import hosts
from ..base import BlockSpec
from ..hosts import Role
from .packed_blocks import GEMMA_BLOCK, LLAMA_BLOCK, PADDLE_BLOCK, PIXTRAL_BLOCK, QWEN_BLOCK, SIGLIP2_BLOCK


def _window(config: Any) -> int:
    """Visual tokens along the side of a window of Qwen2.5-VL."""
    return int(config.window_size) // int(config.spatial_merge_size) // int(config.patch_size)


def _windowed(config: Any, layer: int) -> str:
    return "frame" if layer in config.fullatt_block_indexes else "window"


@dataclass(frozen=True)
class PackedRow:
    """One family of towers; fields of configurations are the tower's own where nothing else is said.

    Attributes:
        layer: class name of its blocks.
        stem: path of the patch embedding's convolution or linear map.
        attn: path of attention in a block, and
        mlp: of its MLP.
        width: field with the channels.
        heads: field with the attention heads.
        span: what a patch of a block is multiplied with (see `PackedTowerShape.spans`), or a function of the
            configuration and the number of the block.
        merge: from the configurations of the tower and of the model, patches along a side that make one visual token.
        inside: whether patches are merged before modules of the tower other than the patch embedding see them.
        window: from the configuration, visual tokens along the side of a window, or None.
        shared: whether all pictures of a call lie in one row.
        extra: tokens of a row behind the patches; the first is a class token.
        pads: whether processors fill rows up to a length of theirs.
        canvas: whether the patch embedding sees pictures on a canvas as large as the largest one.
        pool: path of a module that averages patches by a matrix product, or None.
        table: path of an embedding of places that is resized for each picture, or None, and
        resize: name of the method of the module around it that does so.
        block: hook points of its blocks, or None where none are known.
        told: path of the module that is told sizes of pictures, and
        sizes: its argument with them, or None where pictures have the size of its pixels.
        readers: path of modules that read the whole row between blocks, or None.
    """

    layer: str
    stem: str = "patch_embed.proj"
    attn: str = "attn"
    mlp: str = "mlp"
    width: str = "hidden_size"
    heads: str = "num_heads"
    span: str | Callable[[Any, int], str] = "frame"
    merge: Callable[[Any, Any], int] = lambda own, whole: int(own.spatial_merge_size)
    inside: bool = True
    window: Callable[[Any], int] | None = None
    shared: bool = True
    extra: int = 0
    pads: bool = False
    canvas: bool = False
    pool: str | None = None
    table: str | None = None
    resize: str = ""
    block: BlockSpec | None = None
    told: str = ""
    sizes: Role | None = hosts.TOWER_GRIDS
    readers: str | None = None


_FIELDS: dict[str, Any] = {"attn": "self_attn", "heads": "num_attention_heads"}

PACKED_ROWS: dict[str, PackedRow] = {
    "qwen2_vl_vision": PackedRow("Qwen2VLVisionBlock", width="embed_dim", block=QWEN_BLOCK),
    "qwen2_5_vl_vision": PackedRow("Qwen2_5_VLVisionBlock", span=_windowed, window=_window, block=QWEN_BLOCK),
    "qwen3_vl_vision": PackedRow("Qwen3VLVisionBlock", block=QWEN_BLOCK, readers="deepstack_merger_list"),
    "qwen3_vl_moe_vision": PackedRow("Qwen3VLMoeVisionBlock", block=QWEN_BLOCK, readers="deepstack_merger_list"),
    "qwen3_5_vision": PackedRow("Qwen3_5VisionBlock", block=QWEN_BLOCK),
    "qwen3_5_moe_vision": PackedRow("Qwen3_5MoeVisionBlock", block=QWEN_BLOCK),
    "glm4v_vision": PackedRow("Glm4vVisionBlock", block=QWEN_BLOCK),
    "glm4v_moe_vision": PackedRow("Glm4vMoeVisionBlock", block=QWEN_BLOCK),
    "glm_ocr_vision": PackedRow("GlmOcrVisionBlock"),
    "cohere_compass_vision": PackedRow("CohereCompassVisionBlock"),
    "cosmos3_edge_vision": PackedRow(
        "Cosmos3EdgeVisionEncoderLayer", "embeddings.patch_embedding", inside=False, **_FIELDS
    ),
    "exaone4_5_vision": PackedRow("Exaone4_5_VisionBlock", span=_windowed, window=_window),
    "paddleocr_vl_vision": PackedRow(
        "PaddleOCRVisionEncoderLayer",
        "vision_model.embeddings.patch_embedding",
        inside=False,
        block=PADDLE_BLOCK,
        told="vision_model",
        **_FIELDS,
    ),
    # One row with a mask of blocks: the products are those of the whole row.
    "pixtral": PackedRow(
        "PixtralAttentionLayer",
        "patch_conv",
        attn="attention",
        mlp="feed_forward",
        heads="num_attention_heads",
        span="row",
        merge=lambda own, whole: int(getattr(whole, "spatial_merge_size", 1)),
        canvas=True,
        block=PIXTRAL_BLOCK,
        sizes=hosts.IMAGE_SIZES,
    ),
    "gemma4_vision": PackedRow(
        "Gemma4VisionEncoderLayer",
        "patch_embedder.input_proj",
        span="row",
        merge=lambda own, whole: int(own.pooling_kernel_size),
        shared=False,
        pads=True,
        pool="pooler",
        block=GEMMA_BLOCK,
        sizes=hosts.PIXEL_PLACES,
        **_FIELDS,
    ),
    "llama4_vision_model": PackedRow(
        "Llama4VisionEncoderLayer",
        "patch_embedding.linear",
        span="row",
        merge=lambda own, whole: round(1 / float(own.pixel_shuffle_ratio)),
        shared=False,
        extra=1,
        block=LLAMA_BLOCK,
        sizes=None,
        **_FIELDS,
    ),
    "siglip2_vision_model": PackedRow(
        "Siglip2EncoderLayer",
        "embeddings.patch_embedding",
        span="row",
        merge=lambda own, whole: int(getattr(whole, "downsample_factor", 1)),
        shared=False,
        pads=True,
        table="embeddings.position_embedding",
        resize="resize_positional_embeddings",
        block=SIGLIP2_BLOCK,
        sizes=hosts.PATCH_SHAPES,
        **_FIELDS,
    ),
}
"""By ``config.model_type`` of the tower."""
