"""With the plug-in, vLLM says what transformers says under `vlmtok.compress`, family by family."""

from __future__ import annotations

import pytest
import torch
from checkpoints import FAMILIES, make, prompt
from engine_side import Reply, Request, run
from pictures import pictures
from transformers_side import Answer, Asked, reference

TOLERANCE = 1e-3
"""Of log-probabilities, over the whole vocabulary and all steps; other choices of tokens differ by more than 0.1."""

EVERY = (
    *("divprune:keep=5", "random:keep=6", "todre:keep=5:tau=none", "cdpruner:keep=5", "scope:keep=4"),
    *("visionzip:keep=4:contextual=2", "prumerge:keep=4", "aim:prune=false", "visionzip:keep=6+divprune:keep=3"),
)
"""Served by every family here."""
MORE = {
    "llava_clip": (
        "pitome:ratio=0.8",
        "tome:r=6",
        "crossget:r=6",
        "averagepool:output_size=4",
        "pitome+divprune:keep=9",
    ),
    "qwen2_5_vl": ("pitome:ratio=0.8", "tome:r=4"),
    "qwen3_vl": ("tome:r=4",),
    "internvl": ("averagepool:output_size=2",),
    "gemma3": ("averagepool:output_size=2",),
}
NOT = {"idefics3": ("cdpruner:keep=5",)}
"""Refused where marks stand between the crops of a picture."""


def asked(family: str) -> list[Asked]:
    """A prompt with one picture, one with two of another size."""
    one, (second, third) = pictures(1, (80, 56)), pictures(3, (52, 72))[1:]
    return [Asked(prompt(family, 1), tuple(one)), Asked(prompt(family, 2, "how many are there ?"), (second, third))]


def requests(prompts: list[Asked], spec: str | None) -> list[Request]:
    return [Request(one.text, one.pictures, spec or "none") for one in prompts]


def same(answer: Answer, reply: Reply) -> None:
    """Checks that an engine says what transformers says."""
    assert not reply.error, reply.error
    assert len(reply.prompt) == answer.rows
    assert reply.ids == answer.ids
    torch.testing.assert_close(torch.tensor(reply.logprobs), answer.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_that_is_served(family, tmp_path):
    folder, prompts = make(family, tmp_path / family), asked(family)
    specs = [None, *EVERY, *MORE.get(family, ())]
    specs = [spec for spec in specs if spec not in NOT.get(family, ())]
    # Each by itself, then all of them in one batch, in turns.
    rounds = [requests(prompts, spec) for spec in specs]
    mixed = [request for one in zip(*rounds) for request in one]
    *alone, together = run(folder, [*rounds, mixed])
    expected = reference(folder, specs, prompts, tmp_path / "answers")
    for spec, replies in zip(specs, alone):
        for answer, reply in zip(expected[spec], replies):
            assert reply.model == "VlmtokForConditionalGeneration"
            same(answer, reply)
    for reply, answer in zip(together, [answer for one in zip(*(expected[spec] for spec in specs)) for answer in one]):
        same(answer, reply)
