"""Tiny random models of vision-language families, built in code, and the prompts and pictures that they take.

Weights are multiplied, or a picture would change logits by less than the tolerances of the tests; rows of the head that
belong to placeholders and marks are zero, so that greedy decoding never writes one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .family import Family
from .further_families import FURTHER, FURTHER_TOWERS
from .models_1d import (
    aya_vision,
    blip_2,
    cohere2_vision,
    gemma3,
    gemma4,
    idefics3,
    instructblip,
    internvl,
    lfm2_vl,
    llama4,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    paligemma,
    smolvlm,
)
from .models_mrope import glm4v, glm46v, paddleocr_vl, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from .prompts import END, MARK, START, Prompt
from .shots import (
    PATCH,
    by_sample,
    marked,
    naflex,
    one_crop,
    packed,
    plain,
    pooled_clip,
    pooled_frames,
    pooled_patches,
    queries,
    rows_with_breaks,
    tiles,
)
from .usual import GLM_CLIPS, LARGE, MIXED_CLIPS, MM, QWEN, RUN_CLIPS, SPLIT, STAMPED_CLIPS, WHOLE, WIDE, question


# ---------------------------------------------------------------------- families
def _images_per_prompt(prompts: tuple[Prompt, ...]) -> dict[str, Tensor]:
    """Pictures of each row of LLaVA-OneVision: several in a row are not cut into crops."""
    counts = [sum(not picture.shot.video for picture in prompt.pictures) for prompt in prompts]
    return {"batch_num_images": torch.tensor(counts)} if any(counts) else {}


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", llava, {"I": plain(), "J": plain()}),
        Family("llava_next", llava_next, {"I": LARGE, "J": WIDE}),
        Family(
            "llava_onevision",
            llava_onevision,
            {"I": LARGE, "J": WIDE, "S": one_crop, "V": pooled_clip(3), "W": pooled_clip(3)},
            several=("2S3S5", "4J3", "7"),
            clips=("2I3V4", "3W5"),
            extra=_images_per_prompt,
            tower_gain=2.0,
        ),
        Family("qwen2_vl", qwen2_vl, QWEN | RUN_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
        Family("qwen2_5_vl", qwen2_5_vl, QWEN | RUN_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
        Family("qwen3_vl", qwen3_vl, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
        Family("qwen3_5", qwen3_5, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope", gain=4.0),
        Family(
            "qwen3_vl_moe",
            functools.partial(qwen3_vl, True),
            QWEN | STAMPED_CLIPS,
            clips=MIXED_CLIPS,
            types=MM,
            positions="mrope",
        ),
        Family(
            "qwen3_5_moe",
            functools.partial(qwen3_5, True),
            QWEN | STAMPED_CLIPS,
            clips=MIXED_CLIPS,
            types=MM,
            positions="mrope",
            gain=4.0,
        ),
        Family("glm4v", glm4v, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
        Family("glm46v", glm46v, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
        Family(
            "paddleocr_vl",
            paddleocr_vl,
            {"I": packed(4, 4, 3, PATCH, PATCH), "J": packed(2, 4, 3, PATCH, PATCH)},
            types=MM,
            positions="mrope",
        ),
        Family("internvl", internvl, {"I": tiles(), "J": tiles(), "M": tiles(3)}, several=("2M3J5", "4I3", "7")),
        Family(
            "smolvlm",
            smolvlm,
            {"I": WHOLE, "J": WHOLE, "M": SPLIT},
            several=("2M3J5", "4I3", "7"),
            join={"pixel_values": by_sample},
        ),
        Family(
            "idefics3",
            idefics3,
            {"I": WHOLE, "J": WHOLE, "M": SPLIT},
            several=("2M3J5", "4I3", "7"),
            join={"pixel_values": by_sample},
        ),
        Family("mistral3", mistral3, {"I": rows_with_breaks(4, 4), "J": rows_with_breaks(2, 3)}),
        Family(
            "gemma3",
            gemma3,
            {
                "I": tiles(),
                "J": tiles(),
                "M": marked([(MARK, START), (END, MARK + 1, START), (END, MARK + 2, START)], (END,), 16, "first"),
            },
            several=("2M3J5", "4I3", "7"),
            types="token_type_ids",
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "gemma4",
            gemma4,
            {
                "I": pooled_patches(4, 4),
                "J": pooled_patches(2, 4),
                "V": pooled_frames(2, 2, 3),
                "W": pooled_frames(3, 2, 3),
            },
            clips=MIXED_CLIPS,
            types=MM,
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "paligemma",
            paligemma,
            {"I": plain(), "J": plain()},
            rows=("I^6", "J^3"),
            several=("IJ^4", "J^3"),
            types="token_type_ids",
            prefix=True,
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "paligemma2",
            functools.partial(paligemma, True),
            {"I": plain(), "J": plain()},
            rows=("I^6", "J^3"),
            several=("IJ^4", "J^3"),
            types="token_type_ids",
            prefix=True,
            attentions=("eager",),
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "llama4",
            llama4,
            {
                "I": marked([(START, MARK)], (END,)),
                "J": marked([(START, MARK)], (END,)),
                "M": marked([(START,), (MARK + 1,), (MARK + 2, MARK)], (END,)),
            },
            several=("2M3J5", "4I3", "7"),
            beams=False,
        ),
        Family(
            "aya_vision",
            aya_vision,
            {
                "I": marked([(START, MARK)], (END,)),
                "J": marked([(START, MARK)], (END,)),
                "M": marked([(START, MARK + 1), (MARK + 2,), (MARK,)], (END,)),
            },
            several=("2M3J5", "4I3", "7"),
        ),
        Family(
            "cohere2_vision",
            cohere2_vision,
            {
                "I": marked([(START,)], (MARK, END)),
                "J": marked([(START,)], (MARK, END)),
                "M": marked([(START,), (MARK,), (MARK,)], (MARK, END)),
            },
            several=("2M3J5", "4I3", "7"),
        ),
        Family(
            "lfm2_vl",
            lfm2_vl,
            {
                "I": naflex([(4, 4)], False),
                "J": naflex([(2, 4)], False),
                "M": naflex([(4, 4), (4, 4), (2, 4)], True),
            },
            several=("2M3J5", "4I3", "7"),
        ),
        *FURTHER,
    )
}
"""Families whose language model can be cut, by name."""


TOWER_ONLY: dict[str, Family] = {
    family.name: family
    for family in (
        Family("blip-2", blip_2, {"I": queries}, rows=("I3", "I5")),
        Family("instructblip", instructblip, {"I": queries}, rows=("I3", "I5"), extra=question),
        *FURTHER_TOWERS,
    )
}
"""Families of which only the tower can be cut."""


@functools.cache
def shared(name: str, attention: str = "sdpa") -> nn.Module:
    """A model that callers of one process share; they leave it as it was.

    Args:
        name: of the family.
        attention: implementation of attention.
    """
    return {**FAMILIES, **TOWER_ONLY}[name].build(attention)
