"""transformers: vision-language models that feed visual embeddings to a text model. A family is a row of `VLMSpec`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from .. import hosts
from .further_families import FURTHER, FURTHER_EXAMPLES
from .kin import BLIP, BOTH, QWEN, QWEN3, SMOLVLM, shuffled
from .masks import sources
from .refused_families import LOOKED_THROUGH, REFUSED
from .spec import BlockRule, VLMSpec

__all__ = ["EXAMPLES", "LOOKED_THROUGH", "REFUSED", "ROWS"]


def _first_storing_layer(config: Any) -> int:
    """Gemma4 shares keys of its last storing layers: a cut behind the first of them would give keys of two lengths."""
    kinds = list(config.layer_types)
    return min(sources(config, kinds).values(), default=len(kinds) - 1)


def _pooled(config: Any) -> int:
    """Patches that Gemma3 averages into one token."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // int(config.mm_tokens_per_image)


def _projects_slots(core: Any) -> bool:
    """Whether LFM2-VL's projector gets a place for each token that a row could have (from transformers 5.24 on)."""
    return "is_token" in inspect.unwrap(core.get_image_features).__code__.co_varnames


_PALIGEMMA = VLMSpec(
    mask="4d",
    types=hosts.TOKEN_TYPES,
    block=BlockRule(types=(0,), runs=False, sliding="or", first_only=True),
    feature=None,
    tower_cut="slots",
)

ROWS: dict[str, VLMSpec] = {
    "llava": VLMSpec(tower_cut="slots"),
    "llava_next": VLMSpec(
        parts="anyres",
        thumbnail="first",
        tower_cut="spread",
        packing_methods=("pack_image_features", ""),
        varies=True,
    ),
    "llava_onevision": VLMSpec(
        ids=BOTH,
        parts="anyres",
        thumbnail="first",
        tower_cut="spread",
        packing_methods=("pack_image_features", "apply_pooling"),
        varies=True,
    ),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "glm4v": QWEN,
    "glm46v": QWEN,
    "paddleocr_vl": replace(
        QWEN,
        projector="projector",
        ids=("image_token_id",),
        grid_arguments=(hosts.IMAGE_GRIDS,),
        patches="raster",
    ),
    "internvl": VLMSpec(
        lengths_of="crop",
        parts="chunks",
        thumbnail="last",
        tower_cut="spread",
        patches="raster",
        joins=shuffled("downsample_ratio", shrinks=True),
    ),
    "idefics3": SMOLVLM,
    "smolvlm": SMOLVLM,
    "mistral3": VLMSpec(
        parts="rows",
        grid_arguments=(hosts.IMAGE_SIZES,),
        tower_size_argument=hosts.IMAGE_SIZES,
        tower_cut="spread",
        patches="raster",
    ),
    "gemma3": VLMSpec(
        mask="dict",
        types=hosts.TOKEN_TYPES,
        block=BlockRule(),
        feature=None,
        parts="runs",
        tower_cut="spread",
        patches="raster",
        joins=_pooled,
    ),
    "gemma4": VLMSpec(
        projector="embed_vision",
        ids=BOTH,
        mask="dict",
        types=hosts.MODAL_TYPES,
        block=BlockRule(types=(1, 2), full=False, when=("use_bidirectional_attention", "vision")),
        gather=(hosts.PER_LAYER,),
        layer_args=(hosts.PER_LAYER_SLICE,),
        last_cut=_first_storing_layer,
        feature=None,
        parts="runs",
        grid_arguments=(hosts.IMAGE_PLACES, hosts.CLIP_PLACES),
        tower_size_argument=hosts.PIXEL_PLACES,
        whole="its rows are padded, and patches are pooled by their places",
        patches="places",
    ),
    "paligemma": _PALIGEMMA,
    "llama4": VLMSpec(
        core="",
        lm="language_model.model",
        tower="vision_model",
        ids=("image_token_index",),
        feature=None,
        projects_late=True,
        parts="runs",
        thumbnail="last",
        whole="its attention has one rotary table for all tiles, and takes no mask",
        patches="raster",
        joins=lambda config: round(1 / float(config.vision_config.pixel_shuffle_ratio) ** 2),
    ),
    "aya_vision": VLMSpec(
        parts="runs", thumbnail="last", tower_cut="spread", patches="raster", joins=shuffled("downsample_factor")
    ),
    "cohere2_vision": VLMSpec(
        feature=None,
        parts="runs",
        thumbnail="last",
        tower_cut="spread",
        patches="raster",
        joins=shuffled("downsample_factor"),
    ),
    "blip-2": BLIP,
    "instructblip": BLIP,
    "lfm2_vl": VLMSpec(
        feature=None,
        parts="runs",
        thumbnail="last",
        grid_arguments=(hosts.PATCH_SHAPES,),
        tower_size_argument=hosts.PATCH_SHAPES,
        whole="patches are padded, and its projector joins whole squares of them",
        patches="raster",
        varies=True,
        slots=_projects_slots,
    ),
    **FURTHER,
}
"""By ``config.model_type``."""

EXAMPLES: dict[str, str] = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_vl_moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3_5": "Qwen/Qwen3.5-27B",
    "qwen3_5_moe": "Qwen/Qwen3.5-35B-A3B",
    "glm4v": "zai-org/GLM-4.1V-9B-Thinking",
    "glm46v": "zai-org/GLM-4.6V",
    "paddleocr_vl": "PaddlePaddle/PaddleOCR-VL",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "gemma3": "google/gemma-3-4b-it",
    "gemma4": "google/gemma-4-e2b-it",
    "paligemma": "google/paligemma-3b-pt-224",
    "llama4": "meta-llama/Llama-4-Scout-17B-16E",
    "aya_vision": "CohereForAI/aya-vision-8b",
    "cohere2_vision": "CohereLabs/command-a-vision-07-2025",
    "blip-2": "Salesforce/blip2-opt-2.7b",
    "instructblip": "Salesforce/instructblip-vicuna-7b",
    "lfm2_vl": "LiquidAI/LFM2-VL-1.6B",
    **FURTHER_EXAMPLES,
}
"""A published checkpoint of each family, by its name on the hub."""
