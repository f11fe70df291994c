"""Tiny families that differ little from those of `families`: the same prompts, other parts."""

from __future__ import annotations

from .family import Family
from .models_further import (
    cosmos3_omni,
    deepseek_vl,
    exaone4_5,
    glm4v_moe,
    glm_ocr,
    hyperclovax_vision_v2,
    janus,
    lighton_ocr,
    qianfan_ocr,
    vipllava,
)
from .shots import PATCH_VALUES, packed, packed_clip, plain, rows_with_breaks, tiles

MM = "mm_token_type_ids"
QWEN = {"I": packed(4, 4, PATCH_VALUES), "J": packed(2, 4, PATCH_VALUES)}
RUN_CLIPS = {"V": packed_clip(3, 2, 2, "run"), "W": packed_clip(2, 2, 5, "run")}
STAMPED_CLIPS = {"V": packed_clip(3, 2, 2, "stamped"), "W": packed_clip(2, 2, 5, "stamped")}
GLM_CLIPS = {"V": packed_clip(3, 2, 2, "glm"), "W": packed_clip(2, 2, 5, "glm")}
MIXED_CLIPS = ("2I3V4", "3W2J3")

FURTHER: tuple[Family, ...] = (
    Family("deepseek_vl", deepseek_vl, {"I": plain(), "J": plain()}),
    Family("vipllava", vipllava, {"I": plain(), "J": plain()}),
    Family("janus", janus, {"I": tiles(), "J": tiles()}),
    Family("qianfan_ocr", qianfan_ocr, {"I": tiles(), "J": tiles(), "M": tiles(3)}, several=("2M3J5", "4I3", "7")),
    Family("lighton_ocr", lighton_ocr, {"I": rows_with_breaks(4, 4), "J": rows_with_breaks(2, 3)}),
    Family("hyperclovax_vision_v2", hyperclovax_vision_v2, QWEN),
    Family("exaone4_5", exaone4_5, QWEN),
    Family("cosmos3_omni", cosmos3_omni, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
    Family("glm4v_moe", glm4v_moe, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
    Family("glm_ocr", glm_ocr, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
)
"""In the order of the rows of `adapters`."""
