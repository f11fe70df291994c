"""Vision-language families of transformers that differ little from those of `families`: other parts, the same call."""

from __future__ import annotations

from dataclasses import replace

from .. import hosts
from .kin import QWEN, QWEN3, shuffled
from .spec import VLMSpec

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

FURTHER: dict[str, VLMSpec] = {
    "deepseek_vl": VLMSpec(tower="vision_model", projector="aligner", feature=None, tower_cut="slots"),
    "vipllava": VLMSpec(whole="its projector reads several layers of the tower side by side"),
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
        parts="rows",
        grid_arguments=(hosts.IMAGE_SIZES,),
        tower_size_argument=hosts.IMAGE_SIZES,
        whole="all pictures share one row, whose patches are merged in squares",
    ),
    "hyperclovax_vision_v2": replace(FLAT, tower="vision_model", projector="projector"),
    "exaone4_5": FLAT,
    "cosmos3_omni": QWEN3,
    "glm4v_moe": QWEN,
    "glm_ocr": QWEN,
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
}
"""A published checkpoint of each family, by its name on the hub."""
