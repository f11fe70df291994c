"""Vision-language families of transformers that differ little from those of `families`: other parts, the same call."""

from __future__ import annotations

from dataclasses import replace

from .. import hosts
from .kin import BLIP, BOTH, QWEN, QWEN3, SMOLVLM, UNREAD, shuffled
from .spec import BlockRule, VLMSpec

FLAT = replace(
    QWEN,
    ids=("image_token_id",),
    types=None,
    positions="1d",
    parts="runs",
    grid_arguments=(hosts.IMAGE_GRIDS,),
    tower_size_argument=hosts.TOWER_GRIDS,
)
"""Qwen's tower in front of a text model that counts positions in one dimension, so that frames of clips do not show."""

STAMPED = replace(FLAT, ids=BOTH, grid_arguments=(hosts.IMAGE_GRIDS, hosts.CLIP_GRIDS))
"""The same where text stands between frames."""

GOT_OCR2 = VLMSpec(
    feature=None,
    lengths_of="crop",
    parts="chunks",
    thumbnail="last",
    whole="its windows share out a grid of patches",
)

FURTHER: dict[str, VLMSpec] = {
    "deepseek_vl": VLMSpec(tower="vision_model", projector="aligner", feature=None, tower_cut="slots"),
    "vipllava": VLMSpec(feature=None, whole="its projector reads several layers of the tower side by side"),
    "janus": VLMSpec(tower="vision_model", projector="aligner", feature=None, tower_cut="slots"),
    "qianfan_ocr": VLMSpec(
        lengths_of="crop",
        parts="chunks",
        thumbnail="last",
        tower_cut="spread",
        patches="raster",
        joins=shuffled("downsample_ratio", shrinks=True),
    ),
    "lighton_ocr": VLMSpec(
        tower="vision_encoder",
        projector="vision_projection",
        feature=None,
        parts="rows",
        grid_arguments=(hosts.IMAGE_SIZES,),
        tower_size_argument=hosts.IMAGE_SIZES,
        tower_cut="spread",
        patches="raster",
    ),
    "hyperclovax_vision_v2": replace(FLAT, tower="vision_model", projector="projector"),
    "exaone4_5": replace(FLAT, **UNREAD),
    "cosmos3_omni": QWEN3,
    "glm4v_moe": QWEN,
    "glm_ocr": replace(QWEN, **UNREAD),
    "glmga": QWEN,
    "llava_next_video": VLMSpec(
        ids=BOTH,
        parts="anyres",
        thumbnail="first",
        tower_cut="spread",
        packing_methods=("pack_image_features", ""),
        varies=True,
    ),
    "ovis2": VLMSpec(
        projector="visual_embeddings_table",
        feature=None,
        parts="runs",
        whole="its head turns patches into weights over a table of visual words",
    ),
    "got_ocr2": GOT_OCR2,
    "pp_chart2table": GOT_OCR2,
    "fast_vlm": VLMSpec(whole="it is made of convolutions"),
    "perception_lm": VLMSpec(
        feature=None,
        lengths_of="crop",
        parts="chunks",
        thumbnail="first",
        whole="it is a model of timm inside a wrapper of transformers",
    ),
    "granite_docling": replace(
        SMOLVLM,
        projector="vision_model.connector",
        deepstack=(hosts.DEEPSTACK_COLUMNS, hosts.DEEPSTACK_FEATURES),
        tower_cut=None,
        patches=None,
        joins=None,
        whole="features of several of its layers are read",
    ),
    "deepseek_vl_hybrid": VLMSpec(
        tower="vision_model",
        projector="aligner",
        feature=None,
        whole="its projector joins each patch with that of a second tower",
    ),
    "cosmos3_edge": replace(QWEN, projector="projector", **UNREAD),
    "lfm3_vl": replace(STAMPED, tower="vision_tower", projector="multi_modal_projector", attends=False, **UNREAD),
    "muse_glimmer": replace(STAMPED, tower="vision_tower", projector="vision_projection", attends=False, **UNREAD),
    "cohere_compass": replace(QWEN3, **UNREAD),
    "kimi_k25": replace(FLAT, tower="vision_tower", projector="mm_projector", attends=False, latents=True, **UNREAD),
    "step3p7": VLMSpec(
        tower="vision_model",
        feature=None,
        lengths_of="crops",
        parts="runs",
        thumbnail="last",
        whole="convolutions behind its blocks read the grid of patches",
        attends=False,
    ),
    "muse_spark": replace(STAMPED, tower="vision_tower", projector="vision_projection", attends=False, **UNREAD),
    "gemma4_unified": VLMSpec(
        tower="embed_vision",
        projector="embed_vision",
        ids=BOTH,
        mask="dict",
        types=hosts.MODAL_TYPES,
        block=BlockRule(types=(1, 2), sliding="or", when=("use_bidirectional_attention", "vision")),
        feature=None,
        parts="runs",
        grid_arguments=(hosts.IMAGE_PLACES, hosts.CLIP_PLACES),
        tower_size_argument=hosts.IMAGE_PLACES,
        whole="there is none: patches go through one map",
    ),
    "instructblipvideo": BLIP,
    "aria": VLMSpec(whole="queries of its projector read all patches"),
    "idefics2": replace(
        SMOLVLM, tower_cut=None, patches=None, joins=None, whole="latents of its connector read all patches"
    ),
}
"""By ``config.model_type``."""

FURTHER_EXAMPLES: dict[str, str] = {
    "deepseek_vl": "deepseek-community/deepseek-vl-1.3b-chat",
    "vipllava": "llava-hf/vip-llava-7b-hf",
    "janus": "deepseek-community/Janus-Pro-1B",
    "qianfan_ocr": "baidu/Qianfan-OCR",
    "lighton_ocr": "lightonai/LightOnOCR-1B-1025",
    "hyperclovax_vision_v2": "naver-hyperclovax/HyperCLOVAX-SEED-Think-32B",
    "exaone4_5": "LGAI-EXAONE/EXAONE-4.5-33B",
    "cosmos3_omni": "nvidia/Cosmos3-Nano",
    "glm4v_moe": "zai-org/GLM-4.5V",
    "glm_ocr": "zai-org/GLM-OCR",
    "llava_next_video": "llava-hf/LLaVA-NeXT-Video-7B-hf",
    "ovis2": "thisisiron/Ovis2-1B-hf",
    "glmga": "zai-org/GLM-4.6V",
    "pp_chart2table": "PaddlePaddle/PP-Chart2Table_safetensors",
    "got_ocr2": "stepfun-ai/GOT-OCR-2.0-hf",
    "fast_vlm": "KamilaMila/FastVLM-7B",
    "perception_lm": "facebook/Perception-LM-1B",
    "granite_docling": "ibm-granite/granite-for-docling-500m",
    "deepseek_vl_hybrid": "deepseek-community/deepseek-vl-7b-chat",
    "cosmos3_edge": "nvidia/Cosmos3-Edge",
    "lfm3_vl": "LiquidAI/LFM3-VL-2B",
    "muse_glimmer": "meta-models/Muse-Glimmer-30B",
    "cohere_compass": "CohereLabs/North-Micro-Vision-Instruct",
    "kimi_k25": "moonshotai/Kimi-K2.6",
    "step3p7": "stepfun-ai/Step-3.7-Flash",
    "muse_spark": "meta-models/Muse-Spark-Open-816B-A42B",
    "gemma4_unified": "google/gemma-4-12B-it",
    "instructblipvideo": "Salesforce/instructblip-vicuna-7b",
    "aria": "rhymes-ai/Aria",
    "idefics2": "HuggingFaceM4/idefics2-8b",
}
"""A published checkpoint of each family, by its name on the hub."""
