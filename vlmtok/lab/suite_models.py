"""Models that the suite draws, and what it measures of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Row = dict[str, Any]
"""A row of the table: plain values."""

TEXT_TOKENS = 64

SWEEP = (36, 72, 144, 288, 576, 1152, 2880)
"""Visual tokens at which the break-even is looked for."""


@dataclass(frozen=True)
class Subject:
    """A model with its input, ready to be timed.

    Attributes:
        name: of the model.
        model: it.
        calls: stages that can be called, by name (see `macs_of`); the last one goes all the way through the model.
        tokens: visual tokens of one picture.
        batch: rows.
        steps: new tokens of calls that end in ``generate``.
        ends: calls with one and with all new tokens, whose difference is decoding; None for a tower.
    """

    name: str
    model: nn.Module
    calls: dict[str, Callable[[], object]]
    tokens: int
    batch: int
    steps: int = 1
    ends: tuple[str, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Sizes:
    """Shapes of the suite.

    Attributes:
        tower: width, depth, heads, MLP width, picture side and patch side of the vision tower.
        text: width, depth, heads, MLP width and vocabulary of the language model.
        visual: visual tokens of a picture, by name of the model.
        crops: rows of the tower that make such a picture, by the same names.
        tower_batches: pictures at once.
        batches: prompts at once.
        steps: new tokens.
        sweep: visual tokens at which the break-even is looked for.
        towers: spec strings for the tower.
        languages: spec strings for the language model.
    """

    tower: tuple[int, int, int, int, int, int]
    text: tuple[int, int, int, int, int]
    visual: dict[str, int]
    crops: dict[str, int]
    tower_batches: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    sweep: tuple[int, ...]
    towers: tuple[str, ...] = ("tome:r=23", "pitome:ratio=0.9", "crossget")
    languages: tuple[str, ...] = ("todre:keep=0.1:pivot=center", "transprune", "fastv", "divprune:keep=0.1")


FULL = Sizes(
    tower=(1024, 24, 16, 4096, 336, 14),
    text=(4096, 32, 32, 11008, 32064),
    visual={"LLaVA-1.5-7B shape": 576, "LLaVA-NeXT-7B shape": 2880},
    crops={"LLaVA-1.5-7B shape": 1, "LLaVA-NeXT-7B shape": 5},
    tower_batches=(1, 8, 32, 256),
    batches=(1, 8),
    steps=32,
    sweep=SWEEP,
)
"""ViT-L/14 at 336 px, and Vicuna-7B with the visual tokens of LLaVA 1.5 and of LLaVA-NeXT in one picture."""

TINY = Sizes(
    tower=(64, 4, 4, 128, 48, 8),
    text=(64, 16, 4, 128, 128),
    visual={"tiny shape": 36, "tiny shape, 5 crops": 180},
    crops={"tiny shape": 1, "tiny shape, 5 crops": 5},
    tower_batches=(1, 2),
    batches=(1,),
    steps=3,
    sweep=(16, 128),
    towers=("tome:r=3", "pitome:ratio=0.9", "crossget"),
)
"""The same code on shapes that any CPU runs in seconds; the figures mean nothing."""


def tower_config(sizes: Sizes) -> Any:
    """The suite's vision tower as a configuration of transformers."""
    import transformers

    width, depth, heads, hidden, side, patch = sizes.tower
    return transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
    )


def llava_config(sizes: Sizes) -> Any:
    """The suite's vision-language model as a configuration of transformers."""
    import transformers

    width, depth, heads, hidden, vocabulary = sizes.text
    text = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.LlavaConfig(
        vision_config=tower_config(sizes), text_config=text, image_token_index=vocabulary - 1
    )


def draw(config: Any, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, made where it will be."""
    import transformers

    language = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    maker = transformers.AutoModelForImageTextToText if language else transformers.AutoModel
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = maker.from_config(config, dtype=dtype)
    return model.eval()


class Llava:
    """The suite's vision-language model with random prompts.

    Pictures enter the language model as features, so that the tower can be timed apart and a picture may have any
    number of tokens; ``tower + generate`` runs the tower on all crops first. Methods therefore see no attention of the
    tower's (ToDRE starts from the token nearest to the mean).
    """

    def __init__(self, model: nn.Module, name: str, visual: int, crops: int, batch: int, steps: int) -> None:
        config: Any = model.config
        parameter = next(model.parameters())
        given: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        self.model, self.name, self.visual, self.steps, self.batch = model, name, visual, steps, batch
        torch.manual_seed(1)
        side = config.vision_config.image_size
        self.pixels = torch.randn(batch * crops, 3, side, side, **given)
        # Features as long as embeddings of words.
        width = config.text_config.hidden_size
        self.features = 0.02 * torch.randn(batch, visual, width, **given)
        start = torch.full((batch, 1), 1)
        words = torch.randint(3, config.text_config.vocab_size - 1, (batch, TEXT_TOKENS - 1))
        picture = torch.full((batch, visual), config.image_token_index)
        self.ids = torch.cat([start, picture, words], 1).to(parameter.device)

    def tower(self) -> Tensor:
        """All crops through tower and projector, `[B, visual, C]`."""
        found = self.model.get_image_features(self.pixels)  # type: ignore[operator]
        return torch.cat(list(found.pooler_output)).view(self.batch, self.visual, -1)

    def generate(self, features: Tensor, tokens: int) -> object:
        """So many new tokens from features `[B, visual, C]`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return self.model.generate(  # type: ignore[operator]
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tuple(features))},
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )

    def subject(self, whole: bool = True) -> Subject:
        """What is timed: the prefill, and the whole answer with the tower in front."""
        calls: dict[str, Callable[[], object]] = {"prefill": lambda: self.generate(self.features, 1)}
        if whole:
            calls["generate"] = lambda: self.generate(self.features, self.steps)
            calls["tower + generate"] = lambda: self.generate(self.tower(), self.steps)
        ends = ("prefill", "generate") if whole else None
        return Subject(self.name, self.model, calls, self.visual, self.batch, self.steps, ends)
