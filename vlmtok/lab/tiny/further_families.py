"""Tiny families that differ little from those of `families`: the same prompts, other parts."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from .family import Family
from .models_experts import aria, kimi_k25, muse_spark, step3p7
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
from .models_mrope import glmga
from .models_rarer import (
    cohere_compass,
    cosmos3_edge,
    deepseek_vl_hybrid,
    fast_vlm,
    gemma4_unified,
    got_ocr2,
    granite_docling,
    idefics2,
    instructblipvideo,
    lfm3_vl,
    llava_next_video,
    muse_glimmer,
    ovis2,
    perception_lm,
)
from .prompts import END, IMAGE, MARK, START, Shot
from .shots import (
    Maker,
    by_sample,
    frames_of_queries,
    marked,
    packed,
    packed_clip,
    pixels,
    plain,
    pooled_clip,
    pooled_frames,
    rows_with_breaks,
    tiles,
)
from .usual import GLM_CLIPS, LARGE, MIXED_CLIPS, MM, QWEN, SPLIT, STAMPED_CLIPS, WHOLE, WIDE, question

MARKED = marked([(START,)], (END,))
PLANE = {"I": packed(4, 4, 48), "J": packed(2, 4, 48)}
PLANE_CLIPS = {"V": packed_clip(3, 2, 2, "stamped", 48), "W": packed_clip(2, 2, 5, "stamped", 48)}


def tiled(count: int) -> Maker:
    """A picture of Perception LM: the thumbnail, then tiles; pictures of a batch have equally many."""

    def make(generator: torch.Generator) -> Shot:
        shot = tiles(count)(generator)
        order = range(count)
        return replace(
            shot,
            arrays={"pixel_values": shot.arrays["pixel_values"][None]},
            parts=tuple(tile for tile in order for _ in range(16)),
        )

    return make


def masked(make: Maker) -> Maker:
    """A picture as tiles that come with a mask of which are real."""

    def made(generator: torch.Generator) -> Shot:
        shot = make(generator)
        real = torch.ones(len(shot.arrays["pixel_values"]), dtype=torch.bool)
        return replace(shot, arrays={**shot.arrays, "pixel_attention_mask": real})

    return made


def _merged(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Pixels `[20, 192]` and (x, y) `[20, 2]` of the patches of a picture of Gemma 4 without a tower; -1 is padding."""
    count = rows * columns
    place = torch.full((20, 2), -1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place[:count] = torch.stack([x.flatten(), y.flatten()], -1)
    return torch.rand(20, 192, generator=generator) * (place[:, :1] >= 0), place


def merged_patches(rows: int, columns: int) -> Maker:
    """A picture of Gemma 4 without a tower: every patch is a token."""

    def make(generator: torch.Generator) -> Shot:
        count = rows * columns
        shown, place = _merged(generator, rows, columns)
        arrays = {"pixel_values": shown[None], "image_position_ids": place[None]}
        return Shot((START, *[IMAGE] * count, END), arrays, ((1, rows, columns),), (0,) * count)

    return make


def merged_frames(frames: int, rows: int, columns: int) -> Maker:
    """A clip of Gemma 4 without a tower: a time stamp and marks around each frame."""

    def make(generator: torch.Generator) -> Shot:
        shot = pooled_frames(frames, rows, columns)(generator)
        made = [_merged(generator, rows, columns) for _ in range(frames)]
        arrays = {
            "pixel_values_videos": torch.stack([shown for shown, _ in made]),
            "video_position_ids": torch.stack([place for _, place in made]),
            "num_frames_per_video": torch.tensor([frames]),
        }
        return replace(shot, arrays=arrays)

    return make


def stepped(count: int) -> Maker:
    """A picture of Step 3.7: smaller crops of it, then the whole."""

    def make(generator: torch.Generator) -> Shot:
        ids: list[int] = []
        for _ in range(count):
            ids += [MARK, *[IMAGE] * 4, MARK + 1]
        arrays = {
            "pixel_values": pixels(generator, 1, 3, 64, 64),
            "pixel_values_local": pixels(generator, count, 3, 32, 32),
            "num_local_patches": torch.tensor([count]),
        }
        grids = ((1, 2, 2),) * count + ((1, 4, 4),)
        parts = tuple(crop for crop in range(1, count + 1) for _ in range(4)) + (0,) * 16
        return Shot((*ids, START, *[IMAGE] * 16, END), arrays, grids, parts)

    return make


def two_towers(generator: torch.Generator) -> Shot:
    """A picture of DeepSeek-VL 7B in two sizes."""
    shot = plain()(generator)
    return replace(shot, arrays={**shot.arrays, "high_res_pixel_values": pixels(generator, 1, 3, 64, 64)})


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
    Family(
        "llava_next_video",
        llava_next_video,
        {"I": LARGE, "J": WIDE, "V": pooled_clip(3, newline=False), "W": pooled_clip(3, newline=False)},
        clips=("2I3V4", "3W5"),
    ),
    Family(
        "ovis2",
        ovis2,
        {"I": MARKED, "J": MARKED, "M": marked([(START,), (END,), (END,)], (START,))},
        several=("2M3J5", "4I3", "7"),
    ),
    Family(
        "pp_chart2table",
        functools.partial(got_ocr2, "pp_chart2table"),
        {"I": tiles(side=64), "J": tiles(side=64), "M": tiles(3, side=64)},
        several=("2M3J5", "4I3", "7"),
    ),
    Family(
        "got_ocr2",
        got_ocr2,
        {"I": tiles(side=64), "J": tiles(side=64), "M": tiles(3, side=64)},
        several=("2M3J5", "4I3", "7"),
    ),
    Family("fast_vlm", fast_vlm, {"I": plain(side=128), "J": plain(side=128)}, tower_gain=11.0),
    Family(
        "perception_lm",
        perception_lm,
        {"I": tiled(1), "J": tiled(1), "M": tiled(3)},
        several=("2M3M5", "4M3", "7"),
        tower_gain=3.0,
    ),
    Family(
        "granite_docling",
        granite_docling,
        {"I": masked(WHOLE), "J": masked(WHOLE), "M": masked(SPLIT)},
        several=("2M3J5", "4I3", "7"),
        join={"pixel_values": by_sample, "pixel_attention_mask": by_sample},
    ),
    Family("deepseek_vl_hybrid", deepseek_vl_hybrid, {"I": two_towers, "J": two_towers}),
    Family("cosmos3_edge", cosmos3_edge, PLANE | PLANE_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
    Family("lfm3_vl", lfm3_vl, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS),
    Family("muse_glimmer", muse_glimmer, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS),
    Family("cohere_compass", cohere_compass, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
    Family("kimi_k25", kimi_k25, {"I": packed(4, 4, 3, 4, 4), "J": packed(2, 4, 3, 4, 4)}),
    Family("step3p7", step3p7, {"I": stepped(0), "J": stepped(0), "M": stepped(2)}, several=("2M3J5", "4I3", "7")),
    Family(
        "gemma4_unified",
        gemma4_unified,
        {
            "I": merged_patches(4, 4),
            "J": merged_patches(2, 4),
            "V": merged_frames(2, 2, 3),
            "W": merged_frames(3, 2, 3),
        },
        clips=MIXED_CLIPS,
        types=MM,
        gain=2.0,
        tower_gain=2.0,
    ),
    Family("aria", aria, {"I": plain(), "J": plain()}),
    Family(
        "idefics2",
        idefics2,
        {"I": WHOLE, "J": WHOLE},
        join={"pixel_values": by_sample},
    ),
    Family("muse_spark", muse_spark, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS),
    Family("glmga", glmga, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
    Family("glm_ocr", glm_ocr, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
)
"""In the order of the rows of `adapters`."""

FURTHER_TOWERS: tuple[Family, ...] = (
    Family("instructblipvideo", instructblipvideo, {"I": frames_of_queries}, rows=("I3", "I5"), extra=question),
)
"""The same of families of which only the tower can be cut."""
