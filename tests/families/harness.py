"""What the tests of this folder share: the ways to cut, the batches, and what the oracle says to both."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from support import since
from torch import Tensor, nn

from . import oracle as oracles
from .build import FAMILIES, shared
from .oracle import Cut, oracle
from .prompts import Batch, Prompt

oracles.PaliGemmaOracle.capped = since.reached("5.23")

STEPS = 6
NOISE = 1e-4
"""How far logits may be apart."""
GAP = 3e-5
"""How far apart the norms must be that a choice hangs on, as a share: closer ones would prove nothing."""
LAYER = 2

MODES: dict[str, tuple[Cut, ...]] = {
    "bare": (),
    "boundary": (Cut(0.5),),
    "decoder": (Cut(0.0, LAYER),),
    "half": (Cut(0.5, LAYER),),
    "both": (Cut(0.5), Cut(0.0, LAYER)),
    "both+half": (Cut(0.5), Cut(0.5, LAYER)),
}
RENUMBERED: dict[str, tuple[Cut, ...]] = {
    "boundary": (Cut(0.5, positions="renumber"),),
    "half": (Cut(0.5, LAYER, positions="renumber"),),
    "both": (Cut(0.5, positions="renumber"), Cut(0.0, LAYER, positions="renumber")),
    "boundary, then kept": (Cut(0.5, positions="renumber"), Cut(0.5, LAYER)),
}
MERGED: dict[str, tuple[Cut, ...]] = {
    "boundary": (Cut(None),),
    "both": (Cut(None), Cut(None, LAYER)),
    "merged, then cut": (Cut(None), Cut(0.5, LAYER)),
}
BY_SAMPLE: dict[str, tuple[Cut, ...]] = {
    "bare": (),
    "boundary": (Cut(0.25, scope="sample"),),
    "both+half": (Cut(0.5, scope="sample"), Cut(0.5, LAYER, scope="sample")),
}


@dataclass(frozen=True)
class Expected:
    """What the oracle says to a batch.

    Attributes:
        tokens: int64 `[B, steps]`.
        logits: `[B, steps, V]`.
    """

    tokens: Tensor
    logits: Tensor

    def check(self, tokens: Tensor, logits: Tensor) -> None:
        """Asserts that a model said the same."""
        difference = (logits - self.logits).abs().max()
        assert difference <= NOISE, f"logits differ by {difference:.2e}"
        assert torch.equal(tokens, self.tokens), f"{tokens.tolist()} is not {self.tokens.tolist()}"


def ask(
    name: str, prompts: tuple[Prompt, ...], cuts: tuple[Cut, ...], steps: int = STEPS, forced: Tensor | None = None
) -> Expected:
    """What the oracle says to prompts, row by row; `forced` is what it writes instead, int64 `[B, steps]`."""
    asked = oracle(name, shared(name, "eager"))
    rows = [asked.generate(p, cuts, steps, None if forced is None else forced[i]) for i, p in enumerate(prompts)]
    assert asked.gap > GAP, f"a choice hangs on {asked.gap:.1e}: change a seed"
    return Expected(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))


@functools.cache
def batch(name: str, which: str = "rows") -> Batch:
    """A batch of a family: its ``rows``, ``several`` or ``clips``."""
    return FAMILIES[name].batch(*getattr(FAMILIES[name], which))


@functools.cache
def expected(name: str, cuts: tuple[Cut, ...], which: str = "rows", steps: int = STEPS) -> Expected:
    """What the oracle says to a batch; the same for all tests of a process."""
    return ask(name, batch(name, which).prompts, cuts, steps)


def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int = STEPS, **options: object) -> tuple[Tensor, ...]:
    """Greedy decoding by the host: tokens `[B, steps]` and logits `[B, steps, V]`."""
    given = {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **{**given, **options})
    return out.sequences[:, -steps:], torch.stack(out.logits, 1)


BY_CROP = {
    *("smolvlm", "idefics3", "llama4", "aya_vision", "cohere2_vision", "lfm2_vl", "gemma3"),
    *("ovis2", "granite_docling", "step3p7", "idefics2"),
}
"""Marks, which are text, stand between the crops of a picture, and nothing tells them from other text: a crop counts as
a picture."""
PAIRS = [(name, attention) for name, family in FAMILIES.items() for attention in family.attentions]
"""Every family with each attention implementation that its host runs with."""
