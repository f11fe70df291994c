"""A tiny vision-language family: its model and the prompts that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import MARK, PAD, WORDS, Batch, Prompt, write
from .shots import Maker


@dataclass(frozen=True)
class Family:
    """A family and its prompts.

    Attributes:
        name: ``config.model_type``, or that with a word on what is special.
        make: builds the model.
        shots: pictures and clips, by letter: ``I`` and ``J`` take one run of placeholders each (of different lengths
            where the family allows that), ``M`` is one that is cut into crops, ``V`` and ``W`` are clips.
        rows: patterns of the two rows of the usual batch.
        several: patterns of a batch with several pictures in a row, some cut into crops, and a text row.
        clips: patterns of a batch with clips, or None.
        types: see `Batch`.
        prefix: see `Batch`.
        join: see `Batch`.
        extra: see `Batch`.
        attentions: attention implementations that the host runs with.
        positions: ``1d`` or ``mrope``.
        gain: factor on the matrices of the text model and its head, and
        tower_gain: on those of the tower and the projector.
        beams: whether the host's own beam search works with pictures.
    """

    name: str
    make: Callable[[], nn.Module]
    shots: Mapping[str, Maker]
    rows: tuple[str, ...] = ("3I6", "2J4")
    several: tuple[str, ...] = ("2I3J5", "4J3", "7")
    clips: tuple[str, ...] | None = None
    types: str | None = None
    prefix: bool = False
    join: Mapping[str, Callable[[list[list[Tensor]]], Tensor]] = field(default_factory=dict)
    extra: Callable[[tuple[Prompt, ...]], dict[str, Tensor]] | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager")
    positions: str = "1d"
    gain: float = 8.0
    tower_gain: float = 4.0
    beams: bool = True

    def build(self, attention: str = "sdpa") -> nn.Module:
        """A model of its own, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = self.make().eval()
        model.set_attn_implementation(attention)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    if parameter.min() == parameter.max():  # what the host starts from zeros or ones
                        parameter.normal_(std=0.1, generator=generator)
                    text = any(part in name for part in ("language_model", "text_model", "lm_head"))
                    parameter.mul_(self.gain if text else self.tower_gain)
            head = model.get_output_embeddings().weight
            head[: WORDS.start] = 0
            head[MARK:] = 0
        part: Any
        for part in (model, getattr(model, "language_model", None)):  # BLIP-2 lets its text model generate
            if hasattr(part, "generation_config"):
                part.generation_config.eos_token_id = None
                part.generation_config.pad_token_id = PAD
        made: nn.Module = model
        return made

    def prompt(self, pattern: str, seed: int = 0) -> Prompt:
        """One prompt."""
        return write(pattern, self.shots, seed)

    def batch(self, *patterns: str, seed: int = 0) -> Batch:
        """Prompts with different words and pictures."""
        return self.collect(*(self.prompt(pattern, 10 * seed + row) for row, pattern in enumerate(patterns)))

    def collect(self, *prompts: Prompt) -> Batch:
        """Prompts as a batch."""
        return Batch(prompts, self.types, self.prefix, self.join, self.extra)
