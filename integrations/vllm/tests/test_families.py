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

READS_TEXT = "cdpruner:keep=5"
EVERY = (
    *("divprune:keep=5", "random:keep=6", "todre:keep=5:tau=none", READS_TEXT, "scope:keep=4"),
    *("visionzip:keep=4:contextual=2", "prumerge:keep=4", "aim:prune=false", "visionzip:keep=6+divprune:keep=3"),
)
"""Served by every family here."""
MORE = {
    "llava_clip": (
        "pitome:ratio=0.8",
        "tome:r=6",
        "crossget:rv=6",
        "averagepool:output_size=4",
        "pitome+divprune:keep=9",
    ),
    "qwen2_5_vl": ("pitome:ratio=0.8", "tome:r=4"),
    "qwen3_vl": ("tome:r=4",),
    "internvl": ("averagepool:output_size=2",),
    "gemma3": ("averagepool:output_size=2",),
}
MARKED = ("internvl", "gemma3", "idefics3")
"""Families that write marks around pictures: what reads the text behind one picture cannot know those of the next."""


CORE = ("llava_clip", "llava_next", "qwen3_vl")
"""One with a class token, one whose crops the host packs, one with M-RoPE and DeepStack."""


def asked(family: str) -> list[Asked]:
    """A prompt with one picture, one with two of another size."""
    one, (second, third) = pictures(1, (80, 56)), pictures(3, (52, 72))[1:]
    return [Asked(prompt(family, 1), tuple(one)), Asked(prompt(family, 2, "how many are there ?"), (second, third))]


def same(answer: Answer, reply: Reply) -> None:
    """Checks that an engine says what transformers says."""
    assert not reply.error, reply.error
    assert len(reply.prompt) == answer.rows
    assert reply.ids == answer.ids
    torch.testing.assert_close(torch.tensor(reply.logprobs), answer.logprobs, atol=TOLERANCE, rtol=0)


def test_a_picture_whose_tokens_see_each_other_is_refused_on_a_cpu(tmp_path):
    """vLLM's attention for CPUs is causal there, and the bare model's answers would be wrong as well."""
    with pytest.raises(RuntimeError, match="see each other in gemma3"):
        run(make("gemma3", tmp_path / "gemma3"), [])


@pytest.mark.parametrize("family", CORE)
def test_every_method_that_is_served(family, tmp_path):
    served_as_by_transformers(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*CORE, "gemma3")])
def test_further_families(family, tmp_path):
    served_as_by_transformers(family, tmp_path)


@pytest.mark.gpu
def test_a_family_whose_tokens_of_a_picture_see_each_other(tmp_path):
    served_as_by_transformers("gemma3", tmp_path)


def served_as_by_transformers(family, tmp_path):
    """Each method on prompts of one picture and of two, alone and in one batch with all others."""
    folder, prompts = make(family, tmp_path / family), asked(family)
    wanted = [(spec, one) for spec in (None, *EVERY, *MORE.get(family, ())) for one in prompts]
    blind = [one for one in wanted if one[0] == READS_TEXT and len(one[1].pictures) > 1 and family in MARKED]
    served = [one for one in wanted if one not in blind]
    # Each setting by itself, then all of them in one batch, in turns.
    specs = list(dict.fromkeys(spec for spec, _ in served))
    rounds = [[Request(p.text, p.pictures, s or "none") for s, p in served if s == spec] for spec in specs]
    mixed = [Request(p.text, p.pictures, s or "none") for s, p in served[::-1]]
    refused = [[Request(p.text, p.pictures, s)] for s, p in blind]
    *alone, together = run(folder, [*rounds, *refused, mixed])
    expected = {}
    for one in prompts:
        own = [spec for spec, p in served if p is one]
        for spec, (answer,) in reference(folder, own, [one], tmp_path / "answers").items():
            expected[spec, one.text] = answer
    answers = [expected[spec, one.text] for spec, one in served]
    replies = [reply for replies in alone[: len(rounds)] for reply in replies]
    assert len(replies) == len(served) == len(together)
    for answer, reply in (*zip(answers, replies), *zip(answers[::-1], together)):
        assert reply.model == "VlmtokForConditionalGeneration"
        same(answer, reply)
    for (reply,) in alone[len(rounds) :]:
        assert "marks of its own" in reply.error
