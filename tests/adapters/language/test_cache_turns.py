"""Later turns on caches that lost entries, drafts that are taken back, and calls that cannot go on with them."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from support import models, oracle
from support.cache_choices import Rule
from support.cache_methods import Held, Pairs
from support.checks import assert_equal, assert_same
from support.hosts_of import cache_of, with_cache
from support.llava_by_oracle import (
    STEPS,
    Top,
    assert_follow_up_equals_the_oracle,
    assert_two_turns_equal_the_oracle,
    decider,
    first_turn,
    follow_up,
    llava,
)
from support.models import Batch

import vlmtok
from vlmtok.errors import CacheError

TURNS = {
    "places": [Held(Rule())],
    "mass of heads": [Held(Rule("attention_mass", 0.3, "head"))],
    "ragged": [Held(Rule("above"))],
    "all but the first layer": [Held(Rule(keep=0.25, layers=(1, 2, 3, 4, 5)))],
    "nothing stays": [Held(Rule(keep=0.0))],
    "pairs by size": [Pairs("head", keys="weighted", proportional=True)],
    "behind the boundary": [Top(0.5), Held(Rule("attention_mass", 0.5))],
    "around a cut": [Top(0.5, "decoder", positions="renumber"), Held(Rule(keep=0.5, scope="head"))],
    "forgotten": [Top(0.5, "decoder", 3, forget=True)],
    "forgotten, renumbered": [Top(0.5, "decoder", 3, positions="renumber", forget=True), Held(Rule(keep=0.5))],
}
BEFORE_ALL = ("all but the first layer",)
"""Layer 0, by which hosts tell how much is held, keeps everything."""


@pytest.mark.parametrize("name", TURNS)
def test_a_follow_up_turn_with_new_ids_only(name):
    """New ids and a mask of the full length on a returned cache equal the whole conversation from scratch."""
    model, batch, methods = llava(), Batch.of("^3I5", "^2I1I4", "6"), TURNS[name]
    question = models.prompt("5", seed=9).expand(3, -1)
    with vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        out = follow_up(model, batch, one, question)
    assert_follow_up_equals_the_oracle(model, batch, question, methods, run, one, out)


@pytest.mark.parametrize("name", TURNS)
def test_a_second_turn_with_a_new_picture(name):
    """Its entries leave as well; those of the first stay as they were."""
    shorter = any(isinstance(method, Top) for method in TURNS[name])
    assert_two_turns_equal_the_oracle(TURNS[name], Batch.of("^3I5"), Batch.of("2I4", seed=7), shorter)


@pytest.mark.parametrize("name", TURNS)
def test_a_second_turn_through_generate(name):
    """With the new ids, the returned cache and a mask of the full length: right, or refused with the cure."""
    model, batch, methods = llava(), Batch.of("^3I5"), TURNS[name]
    question = models.prompt("5", seed=9)[None]
    with vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        fresh = torch.cat([one.sequences[:, -1:], question], 1)
        full = torch.ones(1, one.sequences.shape[1] + 5, dtype=torch.int64)
        more = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        two = model.generate(input_ids=fresh, attention_mask=full, **with_cache(model, cache_of(one)), **more)
    reference, plan, decide = oracle.Llava(model), oracle.Plan(), decider(methods, run)
    reference.generate(batch.rows[0], batch.pixels[0], decide, STEPS, plan=plan)
    whole = torch.cat([one.sequences[0], question[0]])
    ids, wanted = reference.generate(whole, batch.pixels[0], decide, 3, plan=plan)
    assert two.sequences[0, -3:].tolist() == ids.tolist()
    assert_equal(torch.stack(two.logits, 1)[0], wanted)


@pytest.mark.parametrize("name", TURNS)
def test_full_ids_on_a_returned_cache_are_refused(name):
    """Hosts slice full ids by what layer 0 holds: right where it is whole, else said with the cure."""
    model, batch, methods = llava(), Batch.of("^3I5"), TURNS[name]
    with vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        question = models.prompt("5", seed=9)
        full = torch.cat([one.sequences, question[None]], 1)
        given = {"max_new_tokens": 2, "do_sample": False}
        if name not in BEFORE_ALL:
            for mask in ({"attention_mask": torch.ones_like(full)}, {}):
                with pytest.raises(CacheError, match="new ids"):
                    model.generate(input_ids=full, **mask, **with_cache(model, cache_of(one)), **given)
                one = first_turn(model, batch)
            return
        found = model.generate(
            input_ids=full, attention_mask=torch.ones_like(full), **with_cache(model, cache_of(one)), **given
        )
    reference, plan, decide = oracle.Llava(model), oracle.Plan(), decider(methods, run)
    reference.generate(batch.rows[0], batch.pixels[0], decide, STEPS, plan=plan)
    ids, _ = reference.generate(full[0], batch.pixels[0], decide, 2, plan=plan)
    assert found[0, -2:].tolist() == ids.tolist()


@pytest.mark.parametrize("name", TURNS)
def test_a_copy_of_the_cache_goes_on_as_the_cache_does(name):
    model, batch = llava(), Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, TURNS[name]):
        out = model(**batch.inputs(), use_cache=True)
        held, other = cache_of(out), copy.deepcopy(cache_of(out))
        step = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[len(batch.rows[0])]])}
        one = model(**step, **with_cache(model, held)).logits
        assert_same(model(**step, **with_cache(model, other)).logits, one)


@pytest.mark.parametrize("name", TURNS)
def test_one_that_was_cropped_within_the_text_goes_on(name):
    """The last tokens are taken back and written anew."""
    model, batch = llava(), Batch.of("^3I5")
    length = len(batch.rows[0])
    with torch.no_grad(), vlmtok.compress(model, TURNS[name]):
        held = cache_of(model(**batch.inputs(), use_cache=True))
        steps = {"input_ids": torch.tensor([[7, 9]]), "position_ids": length + torch.arange(2)[None]}
        wanted = model(**steps, **with_cache(model, held)).logits
        held.crop(-2)
        again = model(**steps, **with_cache(model, held)).logits
        assert_equal(again, wanted)
        held.crop(-1)
        last = {"input_ids": torch.tensor([[9]]), "position_ids": torch.tensor([[length + 1]])}
        assert_equal(model(**last, **with_cache(model, held)).logits[:, -1], wanted[:, -1])


# ---------------------------------------------------------------------- drafts
def repeated():
    """A prompt whose text repeats, so that there is something to look up."""
    batch = Batch.of("^3I5")
    tail = batch.rows[0][-3:]
    return Batch((torch.cat([batch.rows[0], tail, tail]),), batch.pixels)


@contextlib.contextmanager
def columns_of(model):
    """How many columns each call brings, and the position of the first."""
    calls = []

    def note(module, args, given):
        calls.append((given["input_ids"].shape[1], int(given["position_ids"].flatten()[0])))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("way", ["lookup", "assistant"])
@pytest.mark.parametrize("name", TURNS)
def test_drafts_follow_the_oracle(name, way):
    """Drafts that come with the prompt are checked in front of the eviction, all others behind it.

    So the oracle's later rows begin behind those drafts of the first call that were taken.
    """
    model, batch, methods, steps = llava(), repeated(), TURNS[name], 10
    length, more = len(batch.rows[0]), {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    with vlmtok.compress(model, methods) as run:
        greedy = model.generate(**batch.inputs(), **more)[0, -steps:].tolist()
        drafts = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        if way == "assistant":
            drafts = {"assistant_model": assistant(model, greedy, length)}
        with columns_of(model) as calls:
            found = model.generate(**batch.inputs(), **more, **drafts)[0, -steps:].tolist()
    assert calls[0][0] > length, "no drafts came with the prompt"
    assert way == "lookup" or any(columns > 1 for columns, _ in calls[1:]), "no drafts came later"
    taken = calls[1][1] - length
    reference, plan, decide = oracle.Llava(model), oracle.Plan(), decider(methods, run)
    reference.generate(batch.rows[0], batch.pixels[0], decide, 1, plan=plan)
    for left in plan.evictions.values():
        left[:] = [replace(one, until=one.until + taken) for one in left]
    ids, _ = reference.generate(batch.rows[0], batch.pixels[0], decide, steps, plan=plan)
    assert found == ids.tolist()
    if taken == 0:
        assert found == greedy


def assistant(model, script, start):
    """A model that says a script, wrong in every third place, so that drafts are both taken and thrown away."""
    helper = copy.deepcopy(model)

    def say(module, args, output):
        at = cache_of(output).get_seq_length() - start
        word = script[at] if at < len(script) and at % 3 != 2 else 7
        rows = torch.nn.functional.one_hot(torch.tensor(word), output.logits.shape[-1])
        output.logits[:, -1] = rows.to(output.logits)
        return output

    helper.register_forward_hook(say)
    return helper
