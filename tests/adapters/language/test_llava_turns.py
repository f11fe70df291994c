"""Later turns of a dialogue with LLaVA: on the cache of the one before, with new pictures, on copies, cropped."""

from __future__ import annotations

import copy

import pytest
import torch
from support import models, oracle
from support.checks import assert_equal
from support.hosts_of import cache_of, with_cache
from support.llava_by_oracle import (
    CUTS,
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
from vlmtok.errors import CacheError, PassError

TURNS = ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered", "decoder twice", "everything"]


@pytest.mark.parametrize("cut", TURNS)
def test_a_follow_up_turn_with_new_ids_only(cut):
    """New ids and a mask of the full length on a returned cache equal the whole conversation from scratch."""
    model, batch, methods = llava(), Batch.of("^3I5", "^2I1I4", "6"), CUTS[cut]
    question = models.prompt("5", seed=9).expand(3, -1)
    with vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        out = follow_up(model, batch, one, question)
    assert_follow_up_equals_the_oracle(model, batch, question, methods, run, one, out)


@pytest.mark.parametrize("cut", TURNS)
def test_a_second_turn_through_generate(cut):
    """generate() with the new ids, the returned cache and a mask of the full length."""
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    question = models.prompt("5", seed=9)[None]
    with vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        fresh = torch.cat([one.sequences[:, -1:], question], 1)
        full = torch.ones(1, one.sequences.shape[1] + 5, dtype=torch.int64)
        try:
            two = model.generate(
                input_ids=fresh,
                attention_mask=full,
                **with_cache(model, cache_of(one)),
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        except CacheError as refusal:
            pytest.fail(f"new ids and a full mask are the documented way, and were refused: {refusal}")
    reference, plan = oracle.Llava(model), oracle.Plan()
    reference.generate(batch.rows[0], batch.pixels[0], decider(methods, run), STEPS, plan=plan)
    whole = torch.cat([one.sequences[0], question[0]])
    ids, wanted = reference.generate(whole, batch.pixels[0], decider(methods, run), 3, plan=plan)
    assert two.sequences[0, -3:].tolist() == ids.tolist()
    assert_equal(torch.stack(two.logits, 1)[0], wanted)


@pytest.mark.parametrize("cut", TURNS)
def test_full_ids_on_a_returned_cache_are_refused(cut):
    """Hosts slice full ids by the length of the cut cache: silently wrong without a check."""
    model, batch = llava(), Batch.of("^3I5")
    with vlmtok.compress(model, CUTS[cut]):
        one = first_turn(model, batch)
        full = torch.cat([one.sequences, models.prompt("5", seed=9)[None]], 1)
        given = {**with_cache(model, cache_of(one)), "max_new_tokens": 2, "do_sample": False}
        if "decoder" in cut and cut != "decoder twice" and model.model.language_model.layers:
            pass
        length = cache_of(one).get_seq_length()
        if length == full.shape[1] - 6:
            # The first layers are uncut: the host slices right, and the result must be right too.
            fresh = model.generate(input_ids=full, attention_mask=torch.ones_like(full), **given)
            assert fresh.shape[1] == full.shape[1] + 2
            return
        with pytest.raises(CacheError, match="new ids"):
            model.generate(input_ids=full, attention_mask=torch.ones_like(full), **given)
        one = first_turn(model, batch)
        given.update(with_cache(model, cache_of(one)))
        with pytest.raises(CacheError, match="new ids"):
            model.generate(input_ids=full, **given)


@pytest.mark.parametrize(
    "cut", ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered", "decoder twice"]
)
def test_a_second_turn_with_a_new_picture(cut):
    assert_two_turns_equal_the_oracle(CUTS[cut], Batch.of("^3I5"), Batch.of("2I4", seed=7))


class Bright(Top):
    """As `Top`, for pictures whose tokens are above 0 in the first channel; others keep all."""

    def reduce(self, view):
        assert len(view.tokens) == 1
        return super().reduce(view) if view.tokens[:, :, 0].mean() > 0 else None


CUT_LATER = {
    "kept": [Top(6), Bright(3, "decoder", 1)],
    "renumbered": [Top(6), Bright(3, "decoder", 1, positions="renumber")],
    "between two": [Top(6), Bright(4, "decoder", 1, positions="renumber"), Top(3, "decoder", 4)],
    "between two, renumbered": [
        Top(6),
        Bright(4, "decoder", 1, positions="renumber"),
        Top(3, "decoder", 4, positions="renumber"),
    ],
}


@pytest.mark.parametrize("cut", CUT_LATER)
def test_a_second_turn_is_the_first_that_cuts_inside(cut):
    """Layers that part from the others in the second turn go on from the positions of the first."""
    assert_two_turns_equal_the_oracle(CUT_LATER[cut], Batch.of("^3I5"), Batch.of("2I4", seed=2))
    with torch.no_grad(), vlmtok.compress(llava(), CUT_LATER[cut]) as run:
        left = []
        for batch in (Batch.of("^3I5"), Batch.of("2I4", seed=2)):
            llava()(**batch.inputs())
            left.append([layer.visual.high for layer in run.report().layers if layer.stage == "decoder"][1])
    assert left[0] == 6 and left[1] < 6


def test_a_picture_after_a_text_only_turn():
    """A cache that was filled without any cut."""
    model, methods = llava(), CUTS["decoder renumbered"] + [Top(0.5)]
    one, two = Batch.of("^7"), Batch.of("2I4", seed=7)
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        out = model(**one.inputs(), use_cache=True)
        full = torch.ones(1, len(one.rows[0]) + len(two.rows[0]), dtype=torch.int64)
        found = model(
            input_ids=two.rows[0][None],
            attention_mask=full,
            pixel_values=two.pixels[0],
            **with_cache(model, cache_of(out)),
        )
    with torch.no_grad():
        whole = torch.cat([one.rows[0], two.rows[0]])
        hidden, _ = oracle.Llava(model).forward(whole, two.pixels[0], decider(methods, run)())
        assert_equal(found.logits[0, -4:], model.lm_head(hidden[-4:]))


@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered", "everything"])
def test_a_copied_cache_goes_on_by_itself(cut):
    """Prefill once, ask twice."""
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    questions = [models.prompt("4", seed=seed)[None] for seed in (11, 12)]
    length = len(batch.rows[0])
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        cache = cache_of(model(**batch.inputs(), use_cache=True))
        found = []
        for question in questions:
            out = model(
                input_ids=question,
                attention_mask=torch.ones(1, length + 4, dtype=torch.int64),
                **with_cache(model, copy.deepcopy(cache)),
            )
            found.append(out.logits)
    reference = oracle.Llava(model)
    with torch.no_grad():
        for question, logits in zip(questions, found):
            plan = oracle.Plan()
            reference.forward(batch.rows[0], batch.pixels[0], decider(methods, run)(), 0, plan)
            whole = torch.cat([batch.rows[0], question[0]])
            hidden, _ = reference.forward(whole, batch.pixels[0], decider(methods, run)(), 0, plan)
            assert_equal(logits[0], model.lm_head(hidden[-4:]))


@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered", "everything"])
def test_a_cropped_cache_goes_on_where_it_was_cropped(cut):
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    length = len(batch.rows[0])
    with torch.no_grad(), vlmtok.compress(model, methods):
        out = model(**batch.inputs(), use_cache=True)
        cache = cache_of(out)
        more = models.prompt("6", seed=4)[None]
        mask = torch.ones(1, length + 6, dtype=torch.int64)
        wanted = model(input_ids=more, attention_mask=mask, **with_cache(model, copy.deepcopy(cache))).logits
        wrong = models.prompt("6", seed=5)[None]
        first = torch.cat([more[:, :2], wrong[:, :4]], 1)
        model(input_ids=first, attention_mask=mask, **with_cache(model, cache))
        cache.crop(-4)
        found = model(input_ids=more[:, 2:], attention_mask=mask, **with_cache(model, cache)).logits
    assert_equal(found[0], wanted[0, 2:])


@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered"])
def test_a_cache_cropped_into_what_was_cut_is_refused(cut):
    model, batch = llava(), Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, CUTS[cut]):
        cache = cache_of(model(**batch.inputs(), use_cache=True))
        cache.crop(-12)
        with pytest.raises((CacheError, PassError)):
            model(input_ids=models.prompt("3")[None], **with_cache(model, cache))


def test_placeholders_that_were_generated_are_text():
    """Only placeholders that come with features are pictures."""
    model, batch = llava(), Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, CUTS["boundary renumbered"]):
        out = model(**batch.inputs(), use_cache=True)
        ids = torch.tensor([[5, models.IMAGE, 7]])
        mask = torch.ones(1, len(batch.rows[0]) + 3, dtype=torch.int64)
        found = model(input_ids=ids, attention_mask=mask, **with_cache(model, cache_of(out))).logits
    assert found.shape[1] == 3
    assert bool(found.isfinite().all())
