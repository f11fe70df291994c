"""What answers, the same way each time: a vision-language model, or a tower."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import ParameterError
from ..loading.models import Loaded
from ..loading.problems import taken_in
from .prompts import DEFAULT_PROMPT, NO_PROMPT, encode_prompt

if TYPE_CHECKING:
    from ..cost.report import Report


TOP = 5
"""Classes that a tower's answer names."""


@dataclass(frozen=True)
class Answer:
    """What one of the two said.

    Attributes:
        text: a language model's answer; the best class, or a description of the embedding, of a tower.
        ids: new tokens of a language model, end of sequence included.
        classes: a tower's best classes with their probabilities.
        output: a tower's output `[F]`, or the first new token's logits, on the CPU in fp32.
    """

    text: str
    ids: tuple[int, ...] = ()
    classes: tuple[tuple[str, float], ...] = ()
    output: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(frozen=True)
class Loyalty:
    """How far the compressed model stays with the bare one, on this input.

    Attributes:
        same: whether the answers are equal: text, best class, or a cosine of at least 0.99.
        tokens: share of the bare answer's tokens that come at the same place, or None for towers.
        divergence: KL divergence of the first new token's or the classes' distribution, in nats, or None.
        cosine: of the towers' outputs, or None.
    """

    same: bool
    tokens: float | None = None
    divergence: float | None = None
    cosine: float | None = None

    def __str__(self) -> str:
        said = ["same" if self.same else "different"]
        if self.cosine is not None:
            said.append(f"cosine {self.cosine:.4f}")
        if self.divergence is not None:
            said.append(f"KL {self.divergence:.2g}")
        return ", ".join(said)


class Runner:
    """Something that answers, the same way each time.

    Attributes:
        prompt: as typed, or None.
    """

    prompt: str | None = None

    def answer(self) -> Answer:
        """One answer."""
        raise NotImplementedError

    def stages(self) -> dict[str, Callable[[], object]]:
        """What to time, by name."""
        raise NotImplementedError

    def doubt(self, report: Report, answer: Answer) -> str | None:
        """Why the books of one answer cannot be of it, or None."""
        return None

    def loyalty(self, bare: Answer, short: Answer) -> Loyalty:
        """How close two answers are."""
        raise NotImplementedError


class Speaker(Runner):
    """A vision-language model: greedy answers to one prompt.

    Args:
        model: from `load`.
        image: RGB.
        prompt: as for `compare`.
        max_new_tokens: of the answer.
        batch: how often the prompt and its picture stand in the batch.
    """

    def __init__(
        self, model: Loaded, image: Image.Image, prompt: str | None, max_new_tokens: int = 32, batch: int = 1
    ) -> None:
        if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ParameterError(f"max_new_tokens={max_new_tokens!r}: at least 1")
        self.loaded = model
        self.prompt = DEFAULT_PROMPT if prompt is None else prompt
        self.tokens = max_new_tokens
        self.inputs = encode_prompt(model, image, self.prompt, batch)

    def generate(self, tokens: int, least: int | None = None) -> Any:
        """Runs the model: a `generate` output with the first step's logits."""
        return self.loaded.model.generate(  # type: ignore[operator]
            **self.inputs,
            max_new_tokens=tokens,
            min_new_tokens=least,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def answer(self) -> Answer:
        """The answer to the first prompt of the batch."""
        found = self.generate(self.tokens)
        # A decoder-only model gives the prompt back before its answer; an encoder-decoder does not.
        ids = found.sequences[0][-len(found.logits) :]
        text = self.loaded.processor.batch_decode([ids], skip_special_tokens=True)[0].strip()
        return Answer(text, tuple(ids.tolist()), output=found.logits[0][0].float().cpu())

    def stages(self) -> dict[str, Callable[[], object]]:
        """The first token, and the whole answer."""
        return {"prefill": lambda: self.generate(1), "answer": lambda: self.generate(self.tokens)}

    def doubt(self, report: Report, answer: Answer) -> str | None:
        """One prefill with every placeholder, and a decode step for each further token of a cached answer."""
        passes, steps = report.passes.get("decoder", 0), report.passes.get("decode steps", 0)
        if not passes:
            return None  # its language model is not cut
        if passes + steps != len(answer.ids) or (passes != 1 and steps):
            return f"an answer of {len(answer.ids)} tokens took {passes} prefills and {steps} decode steps"
        return None

    def loyalty(self, bare: Answer, short: Answer) -> Loyalty:
        """By the text, the tokens and the first token's distribution."""
        equal = sum(a == b for a, b in zip(bare.ids, short.ids))
        return Loyalty(bare.text == short.text, equal / len(bare.ids), divergence(bare.output, short.output))


class Looker(Runner):
    """A vision tower: classes, or an embedding.

    Args:
        model: from `load`.
        image: RGB.
        prompt: None; towers take none.
        batch: how often the picture stands in the batch.
    """

    def __init__(self, model: Loaded, image: Image.Image, prompt: str | None = None, batch: int = 1) -> None:
        if prompt is not None:
            raise ParameterError(NO_PROMPT.format(model.name))
        assert model.pixels is not None and model.encode is not None
        self.loaded = model
        self.encode = model.encode
        prepare = model.pixels
        pixels = taken_in(model.name, image.size, lambda: prepare(image)).to(model.device, model.dtype)
        self.inputs = pixels.expand(batch, -1, -1, -1).contiguous()

    def answer(self) -> Answer:
        """Classes with names where the model has them."""
        output = self.encode(self.inputs)[0].float().cpu()
        labels = self.loaded.labels
        if labels is None:
            return Answer(f"an embedding of {output.numel()} numbers", output=output)
        shares = output.softmax(-1)
        best = shares.topk(min(TOP, len(labels))).indices.tolist()
        classes = tuple((str(labels[i]), float(shares[i])) for i in best)
        return Answer(classes[0][0], classes=classes, output=output)

    def stages(self) -> dict[str, Callable[[], object]]:
        """One forward."""
        return {"forward": lambda: self.encode(self.inputs)}

    def loyalty(self, bare: Answer, short: Answer) -> Loyalty:
        """By the best class and the cosine."""
        return outputs_loyalty(bare, short)


def outputs_loyalty(bare: Answer, short: Answer) -> Loyalty:
    """How close two answers of a tower are: by the best class, where classes have names, and the cosine.

    Args:
        bare: of the uncompressed model.
        short: of the other.
    """
    cosine = float(F.cosine_similarity(bare.output, short.output, dim=0))
    if not bare.classes:
        return Loyalty(cosine >= 0.99, cosine=cosine)
    return Loyalty(bare.text == short.text, None, divergence(bare.output, short.output), cosine)


def divergence(bare: Tensor, short: Tensor) -> float:
    """KL(bare || short) of two distributions given as logits, in nats."""
    found = F.kl_div(short.log_softmax(-1), bare.log_softmax(-1), reduction="sum", log_target=True)
    return max(0.0, float(found)) if math.isfinite(float(found)) else math.inf
