"""Published vision-language models as their configuration and processor files say, so that no file is needed.

A model is made of its configuration without data and counted as any other; its processor is the library's own, with
the settings of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..adapters import adapter_for
from ..core.model_shape import ModelShape
from ..core.site import Layout
from ..loading.models import configured
from ..loading.problems import quiet
from ..loading.processors import Reader, published


@dataclass(frozen=True, eq=False)
class Published:
    """A checkpoint.

    Attributes:
        checkpoint: its name on the hub.
        config: its configuration, as far as shapes go.
        processor: class of its processor.
        pictures: settings of what prepares pictures; ``kind`` is its class.
        clips: the same for clips, or None.
        options: of the processor.
        size: width and height of a picture where nothing is said.
    """

    checkpoint: str
    config: Mapping[str, Any]
    processor: str
    pictures: Mapping[str, Any]
    clips: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None
    size: tuple[int, int] = (896, 896)

    def model(self) -> Any:
        """The model without data, in half precision."""
        return _model(self)

    def reader(self) -> Reader:
        """Its processor."""
        facts = {"processor": self.processor, "pictures": self.pictures, "clips": self.clips}
        return published(self.checkpoint, {**facts, "options": self.options or {}}, self.model().config)

    def __call__(self, name: str) -> ModelShape:
        """The model as counts and widths.

        Args:
            name: of the preset.
        """
        found: ModelShape = adapter_for(self.model()).account()
        layout = Layout(name, found.layout.stages, found.layout.without)
        return replace(found, name=name, layout=layout)


@lru_cache(maxsize=8)
def _model(row: Published) -> Any:
    with quiet():
        return configured(row.config).to(torch.bfloat16)


# ---------------------------------------------------------------------- language models
def _text(
    kind: str, width: int, hidden: int, depth: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


def _siglip(side: int, patch: int, kind: str = "siglip_vision_model", depth: int = 27, **more: Any) -> dict[str, Any]:
    """SigLIP-SO400M."""
    return {
        "model_type": kind,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": depth,
        "num_attention_heads": 16,
        "image_size": side,
        "patch_size": patch,
        **more,
    }


# ---------------------------------------------------------------------- LLaVA
def _clip_config(kind: str, language: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    feature = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return {
        "model_type": kind,
        "vision_config": vision,
        "text_config": language,
        "image_token_index": 32000,
        **feature,
        **more,
    }


_CLIP_PICTURES = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
_CLIP_OPTIONS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_NEXT_POINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _llava(size: str, width: int, hidden: int, depth: int, heads: int) -> Published:
    language = _text("llama", width, hidden, depth, heads, heads, 32064)
    return Published(
        f"llava-hf/llava-1.5-{size}-hf",
        _clip_config("llava", language),
        "LlavaProcessor",
        {"kind": "CLIPImageProcessor", **_CLIP_PICTURES},
        options=_CLIP_OPTIONS,
    )


def _next(size: str, width: int, hidden: int, depth: int, heads: int) -> Published:
    language = _text("llama", width, hidden, depth, heads, heads, 32064)
    return Published(
        f"llava-hf/llava-v1.6-vicuna-{size}-hf",
        _clip_config("llava_next", language, image_grid_pinpoints=_NEXT_POINTS),
        "LlavaNextProcessor",
        {"kind": "LlavaNextImageProcessor", **_CLIP_PICTURES, "image_grid_pinpoints": _NEXT_POINTS},
        options=_CLIP_OPTIONS,
    )


def _onevision(size: str, *language: int, tied: bool = False) -> Published:
    points = [[384 * row, 384 * column] for row in range(1, 7) for column in range(1, 7)]
    square = {"size": {"height": 384, "width": 384}}
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    config = {
        "model_type": "llava_onevision",
        "vision_config": _siglip(384, 14, depth=26, vision_use_head=False),
        "text_config": _text("qwen2", *language),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": points,
        "image_token_index": 151646,
        "video_token_index": 151647,
        "tie_word_embeddings": tied,
    }
    return Published(
        f"llava-hf/llava-onevision-qwen2-{size}-ov-hf",
        config,
        "LlavaOnevisionProcessor",
        {"kind": "LlavaOnevisionImageProcessor", **square, **half, "image_grid_pinpoints": points},
        {"kind": "LlavaOnevisionVideoProcessor", **square, **half},
        {"num_image_tokens": 729, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"},
    )


# ---------------------------------------------------------------------- Qwen
def _qwen25(size: str, width: int, *language: int, tied: bool = False) -> Published:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    text = _text("qwen2_5_vl_text", width, *language, rope_parameters=rope)
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    edges = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}}
    return Published(
        f"Qwen/Qwen2.5-VL-{size}-Instruct",
        {"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": text, "tie_word_embeddings": tied},
        "Qwen2_5_VLProcessor",
        {"kind": "Qwen2VLImageProcessor", **patches, **edges},
        {"kind": "Qwen2VLVideoProcessor", **patches, **edges},
    )


_QWEN3_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_QWEN3_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def _qwen3(
    size: str, tower: Mapping[str, Any], width: int, hidden: int, depth: int, heads: int, tied: bool = False
) -> Published:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text = _text("qwen3_vl_text", width, hidden, depth, heads, 8, 151936, head_dim=128, rope_parameters=rope)
    vision = {
        **tower,
        "num_heads": 16,
        "out_hidden_size": width,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
    }
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    return Published(
        f"Qwen/Qwen3-VL-{size}-Instruct",
        {"model_type": "qwen3_vl", "vision_config": vision, "text_config": text, "tie_word_embeddings": tied},
        "Qwen3VLProcessor",
        {"kind": "Qwen2VLImageProcessor", **patches, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
        {"kind": "Qwen3VLVideoProcessor", **patches, "size": {"shortest_edge": 4096, "longest_edge": 25165824}},
    )


# ---------------------------------------------------------------------- InternVL, Gemma, SmolVLM
def _internvl(size: str, *language: int) -> Published:
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    square = {"size": {"height": 448, "width": 448}}
    config = {
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": _text("qwen2", *language),
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667,
        "tie_word_embeddings": False,
    }
    return Published(
        f"OpenGVLab/InternVL3-{size}-hf",
        config,
        "InternVLProcessor",
        {"kind": "GotOcr2ImageProcessor", **square, "min_patches": 1, "max_patches": 12},
        {"kind": "InternVLVideoProcessor", **square},
        {"image_seq_length": 256},
    )


def _gemma3(size: str, width: int, hidden: int, depth: int, heads: int, kv_heads: int) -> Published:
    kinds = ["sliding_attention" if layer % 6 else "full_attention" for layer in range(1, depth + 1)]
    text = _text("gemma3_text", width, hidden, depth, heads, kv_heads, 262208, head_dim=256, sliding_window=1024)
    config = {
        "model_type": "gemma3",
        "vision_config": _siglip(896, 14, vision_use_head=False),
        "text_config": {**text, "layer_types": kinds},
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
    }
    return Published(
        f"google/gemma-3-{size}-it",
        config,
        "Gemma3Processor",
        {"kind": "Gemma3ImageProcessor", "size": {"height": 896, "width": 896}},
        options={"image_seq_length": 256},
    )


def _smolvlm(size: str, name: str, vision: Mapping[str, Any], language: Mapping[str, Any], scale: int) -> Published:
    side = vision["image_size"]
    config = {
        "model_type": "smolvlm",
        "vision_config": vision,
        "text_config": language,
        "scale_factor": scale,
        "image_token_id": 49190,
    }
    most = {"longest_edge": side}
    return Published(
        f"HuggingFaceTB/SmolVLM2-{size}{name}",
        config,
        "SmolVLMProcessor",
        {"kind": "SmolVLMImageProcessor", "size": {"longest_edge": 4 * side}, "max_image_size": most},
        {"kind": "SmolVLMVideoProcessor", "size": most},
        {"image_seq_len": (side // vision["patch_size"] // scale) ** 2},
    )


_SIGLIP_BASE = {
    "model_type": "smolvlm_vision",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}

PUBLISHED: dict[str, Published] = {
    "llava-1.5-7b": _llava("7b", 4096, 11008, 32, 32),
    "llava-1.5-13b": _llava("13b", 5120, 13824, 40, 40),
    "llava-next-7b": _next("7b", 4096, 11008, 32, 32),
    "llava-next-13b": _next("13b", 5120, 13824, 40, 40),
    "llava-onevision-0.5b": _onevision("0.5b", 896, 4864, 24, 14, 2, 152000, tied=True),
    "llava-onevision-7b": _onevision("7b", 3584, 18944, 28, 28, 4, 152128),
    "qwen2.5-vl-3b": _qwen25("3B", 2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-vl-7b": _qwen25("7B", 3584, 18944, 28, 28, 4, 152064),
    "qwen3-vl-2b": _qwen3("2B", _QWEN3_SMALL, 2048, 6144, 28, 16, tied=True),
    "qwen3-vl-4b": _qwen3("4B", _QWEN3_SMALL, 2560, 9728, 36, 32, tied=True),
    "qwen3-vl-8b": _qwen3("8B", _QWEN3_LARGE, 4096, 12288, 36, 32),
    "internvl3-1b": _internvl("1B", 896, 4864, 24, 14, 2, 151674),
    "internvl3-8b": _internvl("8B", 3584, 18944, 28, 28, 4, 151674),
    "gemma3-4b": _gemma3("4b", 2560, 10240, 34, 8, 4),
    "gemma3-12b": _gemma3("12b", 3840, 15360, 48, 16, 8),
    "smolvlm2-256m": _smolvlm("256M", "-Video-Instruct", _SIGLIP_BASE, _text("llama", 576, 1536, 30, 9, 3, 49280), 4),
    "smolvlm2-2.2b": _smolvlm(
        "2.2B", "-Instruct", _siglip(384, 14, "smolvlm_vision"), _text("llama", 2048, 8192, 24, 32, 32, 49280), 3
    ),
}
"""By name of the preset."""
