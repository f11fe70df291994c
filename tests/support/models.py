"""Tiny models with random weights, one for every class and architecture that an adapter carries.

Towers come from `vlmtok.lab.tiny`; here is the LLaVA that most tests take, and its prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmtok.lab.tiny.towers import (
    CLASSES,
    DEPTH,
    HEADS,
    HF,
    OPEN_CLIP,
    PATCH,
    PATCHES,
    SIDE,
    SIZES,
    TIMM,
    TOWERS,
    WIDTH,
    Tower,
    pictures,
    randomize,
    short_vit,
)

__all__ = [
    "CLASSES",
    "DEPTH",
    "HEADS",
    "HF",
    "OPEN_CLIP",
    "PATCH",
    "PATCHES",
    "SIDE",
    "TIMM",
    "TOWERS",
    "WIDTH",
    "Tower",
    "pictures",
    "short_vit",
]

IMAGE, PAD, BOS, VOCAB = 90, 0, 1, 96
"""Ids of the tiny language models; ids from IMAGE on are never generated (their rows of the head are zero)."""
LM_DEPTH, LM_WIDTH, LM_HEADS = 16, 32, 4
TOWER_SIDE = 32
PLACEHOLDERS = (TOWER_SIDE // PATCH) ** 2


# ---------------------------------------------------------------------- LLaVA
def llava(
    attention: str = "sdpa",
    depth: int = LM_DEPTH,
    tower: str = "clip",
    tower_depth: int = 3,
    feature: int = -2,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """LLaVA 1.5: a CLIP (or SigLIP) tower, a projector and a Llama with grouped queries."""
    import transformers as tf

    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": TOWER_SIDE, "num_hidden_layers": tower_depth}
    vision = tf.CLIPVisionConfig(**sizes) if tower == "clip" else tf.SiglipVisionConfig(**sizes)
    text = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=LM_WIDTH,
        intermediate_size=2 * LM_WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=LM_HEADS,
        num_key_value_heads=LM_HEADS // 2,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=feature,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        attn_implementation=attention,
    )
    model = randomize(tf.LlavaForConditionalGeneration(config), gain=1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    with torch.no_grad():
        model.lm_head.weight[IMAGE:] = 0
    return model.to(dtype)


LLAVA = {
    "HF LLaVA": functools.partial(llava, "sdpa"),
    "HF LLaVA eager": functools.partial(llava, "eager"),
    "HF LLaVA SigLIP": functools.partial(llava, "sdpa", tower="siglip", feature=-1),
}

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{name: tower.build for name, tower in TOWERS.items()},
    **LLAVA,
    "HF LlavaModel": lambda: llava().model,
}
"""Every row of the matrix."""


@functools.cache
def shared(name: str) -> nn.Module:
    """A model that tests of one process share; they leave it as it was."""
    return BUILDERS[name]()


def fresh(name: str) -> nn.Module:
    """A model of one's own."""
    return BUILDERS[name]()


# ---------------------------------------------------------------------- prompts
def prompt(pattern: str, seed: int = 0) -> Tensor:
    """Ids from a pattern: a digit for so many text tokens, ``I`` for a picture, ``^`` for the first token."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for letter in pattern:
        if letter == "^":
            parts.append(torch.tensor([BOS]))
        elif letter == "I":
            parts.append(torch.full((PLACEHOLDERS,), IMAGE))
        else:
            parts.append(torch.randint(2, IMAGE, (int(letter),), generator=generator))
    return torch.cat(parts)


@dataclass(frozen=True)
class Batch:
    """Prompts of different lengths as one left-padded batch.

    Attributes:
        rows: ids of each row without padding.
        pixels: pictures of each row, or None.
    """

    rows: tuple[Tensor, ...]
    pixels: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, *patterns: str, seed: int = 0) -> Batch:
        rows = tuple(prompt(pattern, seed + i) for i, pattern in enumerate(patterns))
        made, at = [], 100 * seed
        for pattern in patterns:
            count = pattern.count("I")
            made.append(pictures(count, at, (TOWER_SIDE, TOWER_SIDE)) if count else None)
            at += 1
        return cls(rows, tuple(made))

    def inputs(self, mask: bool = True, side: str = "left") -> dict[str, Tensor]:
        """Arguments of `forward` and `generate`."""
        length = max(map(len, self.rows))
        ids, real = [], []
        for row in self.rows:
            pad = torch.full((length - len(row),), PAD)
            one, zero = torch.ones_like(row), torch.zeros_like(pad)
            ids.append(torch.cat([pad, row] if side == "left" else [row, pad]))
            real.append(torch.cat([zero, one] if side == "left" else [one, zero]))
        found = {"input_ids": torch.stack(ids)}
        if mask:
            found["attention_mask"] = torch.stack(real)
        shown = [p for p in self.pixels if p is not None]
        if shown:
            found["pixel_values"] = torch.cat(shown)
        return found

    def alone(self, row: int) -> Batch:
        """One row of it."""
        return Batch((self.rows[row],), (self.pixels[row],))

    def __len__(self) -> int:
        return len(self.rows)
