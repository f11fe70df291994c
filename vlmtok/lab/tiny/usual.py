"""Pictures, clips and questions that several tiny families share."""

from __future__ import annotations

import torch
from torch import Tensor

from .prompts import MARK, START, Prompt
from .shots import PATCH_VALUES, AnyRes, marked, packed, packed_clip

MM = "mm_token_type_ids"
QWEN = {"I": packed(4, 4, PATCH_VALUES), "J": packed(2, 4, PATCH_VALUES)}
RUN_CLIPS = {"V": packed_clip(3, 2, 2, "run"), "W": packed_clip(2, 2, 5, "run")}
STAMPED_CLIPS = {"V": packed_clip(3, 2, 2, "stamped"), "W": packed_clip(2, 2, 5, "stamped")}
GLM_CLIPS = {"V": packed_clip(3, 2, 2, "glm"), "W": packed_clip(2, 2, 5, "glm")}
LARGE, WIDE = AnyRes(40, 60, (64, 64)), AnyRes(30, 62, (32, 64))
SPLIT = marked([(START, MARK), (START, MARK + 1), (MARK + 8, MARK + 8, START, MARK + 9)], (START,))
WHOLE = marked([(START, MARK + 9)], (START,))
MIXED_CLIPS = ("2I3V4", "3W2J3")


def question(prompts: tuple[Prompt, ...]) -> dict[str, Tensor]:
    """What InstructBLIP's Q-Former reads besides the picture."""
    return {"qformer_input_ids": torch.stack([prompt.ids[-3:] for prompt in prompts])}
