"""Contract 5: towers, `generate` and beams equal an oracle that knows nothing of the library."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import models, oracle
from support.cells import CACHE_RUNS, LLAVA_RUNS, TOWER_RUNS, ids, made
from support.checks import Subject, assert_differs, assert_equal
from support.player import Player

import vlmtok
from vlmtok.core.between_layers import DropsBetweenLayers


@pytest.mark.parametrize(("method", "model"), TOWER_RUNS, ids=ids(TOWER_RUNS))
def test_a_tower_equals_the_oracle(method, model):
    """Picture by picture through an explicit loop; signals dense, methods asked with views made by hand."""
    tower, found = models.TOWERS[model], models.shared(model)
    pictures, methods = tower.pictures(2), made(method)
    with torch.no_grad():
        bare = tower.run(found, pictures)
        with vlmtok.compress(found, methods) as run:
            head, tokens = tower.run(found, pictures), tower.tokens(found, pictures)
        vision = oracle.vision_of(found)
        for i in range(len(pictures)):
            player = Player(methods, run.layout, {at: run.memory(at) for at in range(len(methods))})
            left = oracle.run_tower(vision, pictures[i : i + 1], player)
            wanted = vision.tokens(left.x[None])
            assert_equal(tokens[i : i + 1], wanted, what="tokens")
            assert_equal(head[i : i + 1], vision.answer(wanted, left.size), what="output")
    assert_differs(head, bare)


STEPS = 3
FORGETFUL = [
    (method, model)
    for method, model in LLAVA_RUNS
    if issubclass(vlmtok.method_class(method), DropsBetweenLayers) and model in ("HF LLaVA", "HF LLaVA eager")
]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(("method", "model"), LLAVA_RUNS, ids=ids(LLAVA_RUNS))
def test_generate_equals_the_oracle(method, model, cached):
    """5: four left-padded rows with one, two or no picture against each row alone, without cache or padding.

    Without a cache a host shows the whole row again at every step, what was generated included: methods that ask the
    text then decide anew.
    """
    assert_generates_as_the_oracle(made(method), model, cached)


@pytest.mark.parametrize(("method", "model"), CACHE_RUNS, ids=ids(CACHE_RUNS))
def test_generate_on_less_of_a_cache_equals_the_oracle(method, model):
    """5: rows behind the prompt do not see what left the cache of their layer."""
    assert_generates_as_the_oracle(made(method), model)


@pytest.mark.parametrize(("method", "model"), CACHE_RUNS, ids=ids(CACHE_RUNS))
def test_generate_on_less_and_less_of_a_cache_equals_the_oracle(method, model):
    """5: asked again after every token, each row sees what is held by then."""
    assert_generates_as_the_oracle([dataclasses.replace(made(method)[0], keep=0.8, every=1)], model, steps=4)


@pytest.mark.parametrize(("method", "model"), FORGETFUL, ids=ids(FORGETFUL))
def test_what_is_forgotten_is_seen_nowhere(method, model):
    """5: rows behind the prompt do not see, in the layers before a cut, what it dropped."""
    assert_generates_as_the_oracle([dataclasses.replace(made(method)[0], forget=True)], model)


def assert_generates_as_the_oracle(methods, model, cached=True, steps=STEPS):
    subject = Subject(model)
    batch = subject.batch
    given = dict(
        **batch.inputs(),
        max_new_tokens=steps,
        do_sample=False,
        use_cache=cached,
        return_dict_in_generate=True,
        output_logits=True,
    )
    bare = torch.stack(subject.model.generate(**given).logits, 1)
    with vlmtok.compress(subject.model, methods) as run:
        found = subject.model.generate(**given)
    logits = torch.stack(found.logits, 1)
    reference = oracle.Llava(subject.model)
    memory = {at: run.memory(at) for at in range(len(methods))}
    for row in range(len(batch)) if cached else (0, 2):  # rows do not meet in either way
        ids, wanted = reference.generate(
            batch.rows[row],
            batch.pixels[row],
            lambda: Player(methods, run.layout, memory),
            steps,
            again=not cached,
            row=row,
        )
        assert found.sequences[row, -steps:].tolist() == ids.tolist(), f"row {row}"
        assert_equal(logits[row], wanted, what=f"logits of row {row}")
    assert_differs(logits, bare)


@pytest.mark.parametrize("method", [method for method, model in LLAVA_RUNS if model == "HF LLaVA"])
def test_beams_follow_the_oracle(method):
    """5: the winning beam of each row has the score that the oracle gives its tokens, cached or not."""
    subject = Subject("HF LLaVA")
    batch, methods = subject.batch, made(method)
    beams = {"num_beams": 2, "output_scores": True, "length_penalty": 0.0, "return_dict_in_generate": True}
    given = {**batch.inputs(), **beams, "max_new_tokens": 3, "do_sample": False}
    with vlmtok.compress(subject.model, methods) as run:
        found = {cached: subject.model.generate(**given, use_cache=cached) for cached in (True, False)}
    reference = oracle.Llava(subject.model)
    memory = {at: run.memory(at) for at in range(len(methods))}
    for cached, out in found.items():
        for row in range(len(batch)):
            tokens = out.sequences[row, -3:]
            _, logits = reference.generate(
                batch.rows[row],
                batch.pixels[row],
                lambda: Player(methods, run.layout, memory),
                3,
                again=not cached,
                row=row,
                given=tokens,
            )
            score = logits.log_softmax(-1)[torch.arange(3), tokens].sum()
            assert_equal(out.sequences_scores[row], score, what=f"score of row {row}, cached: {cached}")
