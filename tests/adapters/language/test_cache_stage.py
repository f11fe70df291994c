"""LLaVA with entries leaving and merging in its caches, behind cuts of every kind, held against a row-by-row oracle."""

from __future__ import annotations

import pytest
import torch
from support import cache_by_mask as by_mask
from support import models, oracle
from support.cache_choices import Rule, gone_of, heard
from support.cache_methods import Held, Pairs, Planned
from support.checks import assert_differs, assert_equal
from support.hosts_of import cache_of
from support.llava_by_oracle import (
    ROWS,
    SPECIAL,
    STEPS,
    Top,
    assert_generates_as_the_oracle,
    decider,
    generated,
    llava,
)
from support.models import Batch
from support.oracle.cuts import Cut
from support.oracle.held import Entries, Eviction, Unit, attend

import vlmtok

ALONE = {
    "places": [Held(Rule())],
    "places of heads": [Held(Rule(keep=0.3, scope="head"))],
    "places of the sample": [Held(Rule(keep=0.3, scope="sample"))],
    "mass": [Held(Rule("attention_mass", 0.3))],
    "mass of heads": [Held(Rule("attention_mass", 0.25, "head"))],
    "mean mass": [Held(Rule("mean_mass", 0.4, "head"))],
    "mass of text": [Held(Rule("text_mass", 0.5))],
    "mass of the last rows": [Held(Rule("recent_mass", 0.4, window=3))],
    "keys": [Held(Rule("key_sum", 0.4))],
    "values": [Held(Rule("value_norm", 0.4, "head"))],
    "as many as are above the mean": [Held(Rule("above"))],
    "nothing stays": [Held(Rule(keep=0.0))],
    "some layers": [Held(Rule(layers=(0, 3)))],
    "some layers answer None": [Held(Rule("attention_mass", 0.4, spared=(0, 2, 5)))],
    "two methods": [Held(Rule(layers=(0, 2))), Held(Rule("attention_mass", 0.3, "head", layers=(1, 4)))],
    "planned": [Planned()],
}
MERGED = {
    "pairs": [Pairs()],
    "pairs of heads": [Pairs("head")],
    "pairs of the sample": [Pairs("sample")],
    "pairs, keys too": [Pairs(keys="weighted")],
    "pairs of heads, keys too": [Pairs("head", keys="weighted")],
    "pairs by size": [Pairs(proportional=True)],
    "pairs of heads by size": [Pairs("head", keys="weighted", proportional=True)],
    "pairs by weights": [Pairs(weights=(0.75, 0.5))],
    "pairs of some layers": [Pairs(layers=(1, 2, 5))],
}
STACKED = {
    "behind the boundary": [Top(0.5), Held(Rule("attention_mass", 0.5))],
    "behind the boundary, kept": [Top(0.5, positions="keep"), Held(Rule(keep=0.5, scope="head"))],
    "behind the boundary, in slot order": [Top(0.5, ordered=False), Held(Rule("recent_mass", 0.5, window=2))],
    "behind the features": [Top(0.5, "features", ordered=False), Held(Rule("attention_mass", 0.5, "head"))],
    "around a cut": [Top(0.5, "decoder"), Held(Rule("attention_mass", 0.5))],
    "around a cut, of heads": [Top(0.5, "decoder", positions="renumber"), Held(Rule("text_mass", 0.5, "head"))],
    "around a cut at an end": [Top(0.5, "decoder", 1, "end", ordered=False), Held(Rule("key_sum", 0.5))],
    "around two cuts": [
        Top(0.5, "decoder", 1),
        Held(Rule("above")),
        Top(0.5, "decoder", 4, positions="renumber"),
    ],
    "behind everything": [
        *vlmtok.parse_methods("pitome:ratio=0.8"),
        Top(0.8, "features"),
        Top(0.7, scope="sample", ordered=False),
        Top(0.6, "decoder", 1, "end"),
        Top(0.5, "decoder", 4, positions="renumber"),
        Held(Rule("attention_mass", 0.5, "head")),
    ],
    "merged where tokens were merged": [*vlmtok.parse_methods("pitome:ratio=0.6"), Pairs(keys="weighted")],
    "merged behind a cut": [Top(0.5, "decoder"), Pairs("head", proportional=True)],
}
FORGOTTEN = {
    "one cut": [Top(0.5, "decoder", forget=True)],
    "one cut at an end": [Top(0.5, "decoder", 1, "end", ordered=False, forget=True)],
    "all at a late cut": [Top(0.1, "decoder", 4, positions="renumber", forget=True)],
    "two cuts": [Top(0.5, "decoder", 1, forget=True), Top(0.5, "decoder", 4, forget=True)],
    "the second of two cuts": [Top(0.5, "decoder", 1), Top(0.5, "decoder", 4, forget=True)],
    "the first of two cuts": [Top(0.5, "decoder", 1, forget=True), Top(0.5, "decoder", 4)],
    "the sample": [Top(0.5, "decoder", 2, scope="sample", positions="renumber", forget=True)],
    "behind the boundary": [Top(0.5), Top(0.5, "decoder", 3, forget=True)],
    "and less of the rest": [Top(0.6, "decoder", 3, forget=True), Held(Rule("attention_mass", 0.5))],
    "and less of the rest, of heads": [Top(0.6, "decoder", 3, forget=True), Held(Rule(keep=0.5, scope="head"))],
}
WRITTEN = {
    "every step": [Held(Rule(keep=0.75, every=1))],
    "every step, of heads": [Held(Rule(keep=0.75, scope="head", every=1))],
    "every second": [Held(Rule("attention_mass", 0.6, every=2))],
    "every second, of heads": [Held(Rule("attention_mass", 0.6, "head", every=2))],
    "mass of text": [Held(Rule("text_mass", 0.6, "sample", every=1))],
    "mean mass": [Held(Rule("mean_mass", 0.6, every=1))],
    "mass of the last rows": [Held(Rule("recent_mass", 0.6, "head", window=3, every=1))],
    "keys": [Held(Rule("key_sum", 0.7, "head", every=1))],
    "as many as are above the mean": [Held(Rule("above", every=1))],
    "some layers": [Held(Rule("attention_mass", 0.5, "head", layers=(0, 3), every=1)), Held(Rule(layers=(1,)))],
    "behind the boundary": [Top(0.5), Held(Rule("attention_mass", 0.75, every=1))],
    "around a cut": [Top(0.5, "decoder", positions="renumber"), Held(Rule("attention_mass", 0.75, "head", every=1))],
    "forgotten": [Top(0.6, "decoder", 3, forget=True), Held(Rule("recent_mass", 0.75, window=2, every=1))],
}
EVERY = {
    **{f"alone: {name}": methods for name, methods in ALONE.items()},
    **{f"merged: {name}": methods for name, methods in MERGED.items()},
    **{f"stacked: {name}": methods for name, methods in STACKED.items()},
    **{f"forgotten: {name}": methods for name, methods in FORGOTTEN.items()},
    **{f"written: {name}": methods for name, methods in WRITTEN.items()},
}


# ---------------------------------------------------------------------- oracles
def units(batch, length, scope):
    """Padded columns of each unit of each row, and of all visual tokens of each row; what ends a prompt stays."""
    found, visual = [], []
    for row in batch.rows:
        columns = (row == models.IMAGE).nonzero()[:, 0] + length - len(row)
        visual.append(columns)
        columns = columns[columns < length - 1]
        parts = (columns,) if scope == "sample" else columns.split(models.PLACEHOLDERS)
        found.append([part for part in parts if len(part)])
    return found, visual


@pytest.mark.parametrize("name", [name for name in ALONE if len(ALONE[name]) == 1 and isinstance(ALONE[name][0], Held)])
def test_two_oracles_agree(name):
    """The host without a cache, told what not to see, and the loop that is written out."""
    (held,), model, batch = ALONE[name], llava("eager"), Batch.of(*ROWS)
    inputs = batch.inputs()
    rows, visual = units(batch, inputs["input_ids"].shape[1], held.rule.scope)
    table = gone_of(held.rule, heard(model, inputs), rows, visual, list(by_mask.storing_layers(model)))
    with by_mask.hidden(model, table) as fired:
        tokens, logits = generated(model, batch, use_cache=False)
    assert fired == {*table}
    with vlmtok.compress(model, held) as run:
        decide = decider([held], run)
    for row in range(len(batch)):
        ids, wanted = oracle.Llava(model).generate(batch.rows[row], batch.pixels[row], decide, STEPS, row=row)
        assert ids.tolist() == tokens[row].tolist()
        assert_equal(logits[row], wanted)


def test_merging_equal_keys_by_size_changes_nothing():
    """Of the oracle: log(size) makes up for entries that left, and without it a merged entry weighs too little."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 6, 4).double() for _ in range(3))
    k[:, 1], v[:, 1] = k[:, 0], v[:, 0]
    mix = torch.tensor([[0.5, 0.5]]).double()
    cut = Cut(torch.tensor([0]), mix, (mix > 0).double())
    places, blocked = torch.arange(6), torch.ones(6, 6).triu(1).bool()
    bare = attend(q, k, v, blocked, 0.5, places, [])[0]
    for sizes, same in ((torch.ones(2), True), (None, False)):
        unit = Unit(torch.tensor([0, 1]), [cut], sizes=sizes)
        found = attend(q, k, v, blocked, 0.5, places, [Eviction(4, [unit])])[0]
        assert_equal(found[:, :4], bare[:, :4])
        assert ((found[:, 4:] - bare[:, 4:]).abs().max() < 1e-12) == same
    held = Eviction(4, [unit]).apply(Entries(k, v, k[..., 0] > 9, 0 * k[..., 0]), places)
    assert held.gone.tolist() == 2 * [[False, True, False, False, False, False]]


# ---------------------------------------------------------------------- what is generated
@pytest.mark.parametrize("name", EVERY)
def test_generates_as_the_oracle(name):
    assert_generates_as_the_oracle(llava("sdpa"), Batch.of(*ROWS), EVERY[name])


@pytest.mark.parametrize("name", [name for at, name in enumerate(EVERY) if at % 3 == 0])
def test_generates_as_the_oracle_with_eager_attention(name):
    assert_generates_as_the_oracle(llava("eager"), Batch.of(*ROWS), EVERY[name])


WAYS = [name for at, name in enumerate(EVERY) if at % 5 == 1 or name == "written: mass of the last rows"]


@pytest.mark.parametrize("name", WAYS)
def test_sampling_follows_the_oracle_and_the_seed(name):
    model, batch, methods, temperature = llava(), Batch.of(*ROWS), EVERY[name], 1.5
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "suppress_tokens": SPECIAL}
    with vlmtok.compress(model, methods) as run:
        torch.manual_seed(5)
        tokens, logits = generated(model, batch, **sampled)
    torch.manual_seed(5)
    for step in range(STEPS):
        scores = logits[:, step].index_fill(1, torch.tensor(SPECIAL), float("-inf"))
        drawn = torch.multinomial((scores / temperature).softmax(-1), 1)[:, 0]
        assert torch.equal(tokens[:, step], drawn), f"step {step}: somebody else drew from the generator"
    for row in range(len(batch)):
        _, wanted = oracle.Llava(model).generate(
            batch.rows[row], batch.pixels[row], decider(methods, run), STEPS, row=row, given=tokens[row]
        )
        assert_equal(logits[row], wanted, what=f"row {row}")


@pytest.mark.parametrize("name", WAYS)
def test_beams_equal_those_alone_and_the_oracle(name):
    """Scores of the best beam are what the oracle says to its tokens."""
    model, batch, methods = llava(), Batch.of("^3I5", "2I2", "^2I1I4", "6"), EVERY[name]
    more = {"num_beams": 3, "output_scores": True, "length_penalty": 0.0, "max_new_tokens": STEPS}
    more |= {"do_sample": False, "return_dict_in_generate": True}
    with vlmtok.compress(model, methods) as run:
        found = model.generate(**batch.inputs(), **more)
        alone = [model.generate(**batch.alone(row).inputs(mask=False), **more) for row in range(len(batch))]
    assert_differs(found.sequences_scores, model.generate(**batch.inputs(), **more).sequences_scores, 1e-4)
    for row in range(len(batch)):
        tokens = found.sequences[row, -STEPS:]
        assert torch.equal(alone[row].sequences[0, -STEPS:], tokens)
        assert_equal(alone[row].sequences_scores[0], found.sequences_scores[row])
        _, wanted = oracle.Llava(model).generate(
            batch.rows[row], batch.pixels[row], decider(methods, run), STEPS, row=row, given=tokens
        )
        score = wanted.log_softmax(-1).gather(1, tokens[:, None]).sum()
        assert_equal(found.sequences_scores[row], score, 1e-4, what=f"score of row {row}")


@pytest.mark.parametrize("name", WAYS)
def test_several_answers_for_one_prompt(name):
    model, batch, methods = llava(), Batch.of("^3I5", "^2I1I4"), EVERY[name]
    with vlmtok.compress(model, methods) as run:
        torch.manual_seed(3)
        sampled = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3, "suppress_tokens": SPECIAL}
        tokens, logits = generated(model, batch, **sampled)
    assert len({tuple(row) for row in tokens.tolist()}) > 2
    for row in range(6):
        _, wanted = oracle.Llava(model).generate(
            batch.rows[row // 3], batch.pixels[row // 3], decider(methods, run), STEPS, given=tokens[row]
        )
        assert_equal(logits[row], wanted, what=f"answer {row}")


@pytest.mark.parametrize("name", WAYS)
def test_a_batch_equals_its_rows(name):
    model, batch = llava(), Batch.of("^3I5", "^2I1I4", "6")
    with vlmtok.compress(model, EVERY[name]):
        tokens, logits = generated(model, batch)
        for row in range(3):
            alone = generated(model, batch.alone(row))
            assert torch.equal(alone[0][0], tokens[row])
            assert_equal(alone[1][0], logits[row])


# ---------------------------------------------------------------------- what is held
@pytest.mark.parametrize("name", EVERY)
def test_events_say_what_the_caches_hold(name):
    """Columns behind the prefill, by layer; entries that left all rows, by head, where rows differ."""
    model, batch = llava(), Batch.of(*ROWS)
    more = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    bare = cache_of(model.generate(**batch.inputs(), **more)).layers[0].keys.shape[2]
    with vlmtok.compress(model, EVERY[name]) as run:
        held = cache_of(model.generate(**batch.inputs(), **more)).layers
        events = [event for event in run._attachment.ledger.last["decoder"].events if event.stage == "cache"]
    assert events
    last = {event.layer: event for event in events}
    for layer, event in last.items():
        assert event.after == held[layer].keys.shape[2] == held[layer].values.shape[2]
        assert event.after <= event.before <= bare
    for event in events:
        assert event.kind in ("cut", "observe", "forget")
        assert (event.kind == "forget") == (not event.groups)
        assert event.gone is not None if event.kind == "forget" else True
        for group in event.groups:
            assert 0 <= group.slots <= group.n <= group.entered


@pytest.mark.parametrize("name", ["alone: places", "alone: mass of heads", "merged: pairs"])
def test_text_and_what_stayed_keep_their_keys(name):
    """Bit for bit, in column order."""
    model, batch = llava(), Batch.of("^3I5")
    more = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    bare = cache_of(model.generate(**batch.inputs(), **more)).layers
    with vlmtok.compress(model, EVERY[name]):
        held = cache_of(model.generate(**batch.inputs(), **more)).layers
    for one, other in zip(held, bare, strict=True):
        assert one.keys.is_contiguous() and one.values.is_contiguous()
        for head in range(one.keys.shape[1]):
            equal = (one.keys[0, head, :, None] == other.keys[0, head, None]).all(-1)
            assert bool((equal.sum(1) == 1).all())
            order = equal.int().argmax(1).tolist()
            assert order == sorted(order) and order[:4] == [0, 1, 2, 3] and order[-5:] == [*range(20, 25)]
