"""What caches hold of a picture is what its plan made of it: never another plan's, never another question's."""

from __future__ import annotations

import pytest
import torch
from checkpoints import make, prompt
from engine_side import Request, run
from pictures import pictures
from test_families import same
from transformers_side import Asked, reference

LONG = "what color is the circle in the picture at the top left and how many are there of the shape ?"
"""Behind a picture of 64 tokens, so that whole blocks of 32 tokens can be cached."""
QUESTIONS = ("what color is it ?", "how many are there ?", "where is the circle ?", "which digit is it ?")
ALIKE = ("divprune:keep=33", "random:keep=33", "scope:keep=33")
"""As many tokens each: lengths do not tell these apart."""
READS_TEXT = "cdpruner:keep=6"

NO_SPEC = """
import dataclasses, vlmtok_vllm.processor as p
def hashes(self, inputs):
    bare = dataclasses.replace(inputs, hf_processor_mm_kwargs=p.foreign(inputs.hf_processor_mm_kwargs))
    return p.MultiModalProcessor._get_mm_hashes(self, bare)
p.VlmtokProcessor._get_mm_hashes = hashes
"""
NO_TEXT = "import vlmtok_vllm.processor as p; p._digest = lambda text: 'the same'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("llava_clip", tmp_path_factory.mktemp("llava_clip"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return tmp_path_factory.mktemp("answers")


def wrong(expected, replies) -> int:
    """Replies that are not what transformers says."""
    return sum(
        len(reply.prompt) != answer.rows
        or reply.ids != answer.ids
        or float((torch.tensor(reply.logprobs) - answer.logprobs).abs().max()) > 1e-2
        for answer, reply in zip(expected, replies)
    )


def test_prefixes_are_shared_under_one_plan_alone(folder, answers):
    (picture,) = pictures(1)
    asked = Asked(prompt("llava_clip", 1, LONG), (picture,))
    specs = [None, *ALIKE]
    rounds = [[Request(asked.text, asked.pictures, spec or "none")] for spec in [*specs, *specs]]
    # A name of the user's own for the picture does not join plans either.
    named = [[Request(asked.text, asked.pictures, spec, ("mine",))] for spec in ("none", *ALIKE, ALIKE[0])]
    replies = [reply for (reply,) in run(folder, [*rounds, *named])]
    expected = [reference(folder, specs, [asked], answers)[spec][0] for spec in specs]
    for answer, first, again, own in zip(expected, replies, replies[len(specs) :], replies[2 * len(specs) :]):
        same(answer, first)
        same(answer, again)
        same(answer, own)
        assert first.cached == own.cached == 0 and again.cached >= 32
    same(expected[1], replies[-1])
    assert replies[-1].cached >= 32
    blind = [reply for (reply,) in run(folder, rounds, before=NO_SPEC)]
    assert wrong([*expected, *expected], blind) >= 3, "the test cannot tell a shared cache"


def test_a_plan_that_reads_the_question_holds_questions_apart(folder, answers):
    first, second = pictures(2)
    prompts = [Asked(prompt("llava_clip", 1, text), (first,)) for text in QUESTIONS]
    # The same question about two pictures, of which one is known already: each keeps its own text.
    prompts += [Asked(prompt("llava_clip", 2, QUESTIONS[0]), pair) for pair in ((first, second), (second, first))]
    rounds = [[Request(one.text, one.pictures, READS_TEXT)] for one in [*prompts, *prompts]]
    # Nothing is asked: both pictures go through the tower together.
    silent = [Asked("USER: what is there ? <image>", (picture,)) for picture in (first, second)]
    *single, pair = run(folder, [*rounds, [Request(one.text, one.pictures, READS_TEXT) for one in silent]])
    replies = [reply for (reply,) in single]
    expected = reference(folder, [READS_TEXT], prompts, answers)[READS_TEXT] * 2
    for answer, reply in zip(expected, replies):
        same(answer, reply)
    for answer, reply in zip(reference(folder, [READS_TEXT], silent, answers)[READS_TEXT], pair):
        same(answer, reply)
    blind = [reply for (reply,) in run(folder, rounds, before=NO_TEXT)]
    assert wrong(expected, blind) >= 2, "the test cannot tell questions apart"
