"""Entries that left caches, in every family: what is generated equals the host, cache-free, told what not to see."""

from __future__ import annotations

import functools

import pytest
import torch
from support import cache_by_mask as by_mask
from support.cache_choices import Rule, gone_in
from support.cache_methods import Held
from support.hosts_of import cache_of
from support.sweep import some
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.errors import MissingSignal, SiteError

from .build import FAMILIES, shared
from .deep import deep
from .harness import BY_CROP, NOISE, PAIRS, batch, generate

STEPS = 4
RULES = {
    "stride": Rule(keep=0.5),
    "stride, heads": Rule(keep=0.4, scope="head"),
    "mass": Rule("attention_mass", 0.3),
    "mass, heads": Rule("attention_mass", 0.5, "head"),
    "recent, sample": Rule("recent_mass", 0.4, "sample", window=3),
    "text, heads": Rule("text_mass", 0.3, "head"),
    "keys": Rule("key_sum", 0.5),
    "values, heads": Rule("value_norm", 0.5, "head"),
    "ragged": Rule("above"),
    "none stay": Rule(keep=0.0),
}
MASSES = {name for name in RULES if RULES[name].by.endswith("mass") or RULES[name].by == "above"}
WITHOUT_ROWS = {"lfm3_vl", "muse_glimmer", "muse_spark", "step3p7"}
"""Families whose attention has a form that gives no rows: rules of attention mass are refused there."""
LATENT = {"kimi_k25"}
"""Families whose cache holds no keys and values of heads: they have no such stage."""
USUAL = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "internvl"),
    *("mistral3", "gemma3", "gemma4", "paligemma", "lfm2_vl", "smolvlm"),
)
"""One family of each form of positions, masks, packing and layers."""
HYBRID = ("qwen3_5", "lfm2_vl")
"""Layers of linear attention, and convolutions, among those with keys."""


@functools.cache
def gone(name, which, rule):
    model = shared(name, "eager")
    return gone_in(rule, model, batch(name, which), batch(name, which).inputs(), name in BY_CROP)


@functools.cache
def bare(name, attention, which="rows"):
    return generate(shared(name, attention), batch(name, which).inputs(), STEPS)


def compare(name, attention, rule, which="rows", seed=None, **options):
    """Generates with entries gone, and without a cache by the oracle; gives what each row said."""
    model, inputs = shared(name, attention), batch(name, which).inputs()
    table = by_mask.for_readers(model, gone(name, which, rule))
    if seed is not None:
        torch.manual_seed(seed)
    with by_mask.hidden(model, table) as fired:
        wanted = generate(model, inputs, STEPS, use_cache=False, **options)
    assert fired == {*table}
    if seed is not None:
        torch.manual_seed(seed)
    with vlmtok.compress(model, Held(rule)):
        found = generate(model, inputs, STEPS, **options)
    assert (found[1] - wanted[1]).abs().max() <= NOISE, f"{(found[1] - wanted[1]).abs().max():.1e}"
    assert torch.equal(found[0], wanted[0])
    return found


def differs(name, attention, found, which="rows"):
    """Later logits are others than without the stage, and those of the prompt are the same."""
    plain = bare(name, attention, which)
    assert (found[1][:, 0] - plain[1][:, 0]).abs().max() <= NOISE
    assert (found[1][:, 1] - plain[1][:, 1]).abs().max() > 10 * NOISE


def ruled(*cases):
    """Cases (name, ..., rule) without those that `WITHOUT_ROWS` and `LATENT` say are refused."""
    refused = [case for case in cases if case[0] in LATENT or (case[0] in WITHOUT_ROWS and case[-1] in MASSES)]
    return [case for case in cases if case not in refused]


# ---------------------------------------------------------------------- the oracle itself
@pytest.mark.parametrize(
    ("name", "attention"), [(name, FAMILIES[name].attentions[at % 2 - 1]) for at, name in enumerate(FAMILIES)]
)
def test_the_oracle_hides_nothing_or_everything(name, attention):
    """Nothing gone: the model with its cache. All pictures gone: other logits behind the prompt, the same in it."""
    model, inputs = shared(name, attention), batch(name).inputs()
    found = {}
    for keep in (1.0, 0.0):
        table = gone_in(Rule(keep=keep), shared(name, "eager"), batch(name), inputs)
        assert all(bool(left.any()) == (keep == 0.0) for left in table.values())
        with by_mask.hidden(model, by_mask.for_readers(model, table)):
            found[keep] = generate(model, inputs, STEPS, use_cache=False)
    plain = bare(name, attention)
    assert torch.equal(found[1.0][0], plain[0])
    assert (found[1.0][1] - plain[1]).abs().max() <= NOISE
    differs(name, attention, found[0.0])


# ---------------------------------------------------------------------- what is generated
@pytest.mark.parametrize(
    ("name", "attention", "rule"), ruled(*((*pair, rule) for pair, rule in some(PAIRS, [*RULES], every=5)))
)
def test_greedy(name, attention, rule):
    differs(name, attention, compare(name, attention, RULES[rule]))


@pytest.mark.parametrize(("name", "rule"), ruled(*some(USUAL, ["stride, heads", "mass", "ragged"], every=3)))
def test_beams(name, rule):
    compare(name, FAMILIES[name].attentions[0], RULES[rule], num_beams=3)


@pytest.mark.parametrize(("name", "rule"), ruled(*some(USUAL, ["stride", "mass, heads", "ragged"], every=3)))
def test_sampling(name, rule):
    compare(name, FAMILIES[name].attentions[-1], RULES[rule], seed=11, do_sample=True, temperature=1.5, top_k=0)


@pytest.mark.parametrize(
    ("name", "rule"), ruled(*some([*FAMILIES], ["stride, heads", "recent, sample", "ragged"], every=3))
)
def test_several_pictures_of_different_sizes_and_a_row_of_text(name, rule):
    compare(name, FAMILIES[name].attentions[0], RULES[rule], "several")


CLIPS = [name for name, family in FAMILIES.items() if family.clips and name not in WITHOUT_ROWS]


@pytest.mark.parametrize(
    ("name", "scope", "by"), some(CLIPS, ["picture", "head", "frame", "part"], ["stride", "attention_mass"], every=4)
)
def test_clips(name, scope, by):
    compare(name, FAMILIES[name].attentions[0], Rule(by, 0.5, scope), "clips")


@pytest.mark.parametrize("name", sorted(LATENT))
def test_latents_are_refused(name):
    with pytest.raises(SiteError, match=r"a latent of each token"):
        vlmtok.compress(shared(name, FAMILIES[name].attentions[0]), Held())


@pytest.mark.parametrize("name", sorted(WITHOUT_ROWS))
def test_rules_of_mass_are_refused_where_attention_gives_no_rows(name):
    model = shared(name, FAMILIES[name].attentions[0])
    for rule in sorted(MASSES):
        with pytest.raises(MissingSignal, match=r"at cache layer \d end, .*attention of unknown form"):
            vlmtok.compress(model, Held(RULES[rule]))
    assert not any(part._forward_pre_hooks for part in by_mask.text_model(model).layers)


SPLIT = [name for name, family in FAMILIES.items() if "M" in family.shots or name.startswith("llava_")]


@pytest.mark.parametrize(("name", "scope"), some(SPLIT, ["part", "clip", "frame"], every=2))
def test_crops_and_separators(name, scope):
    compare(name, FAMILIES[name].attentions[0], Rule(keep=0.5, scope=scope), "several")


# ---------------------------------------------------------------------- layers
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LATENT])
def test_layers_whose_entries_can_leave(name):
    """Full attention and keys of their own: no windows, recurrent layers or readers of others' keys are among them."""
    model = shared(name, FAMILIES[name].attentions[0])
    layout = adapter_for(model).layout()
    storing = by_mask.storing_layers(model)
    assert layout.cached_layers() == sorted(storing)
    assert {*layout.stages["cache"].blind} == {*range(layout.stages["cache"].depth)} - {*storing}
    for layer in layout.stages["cache"].blind:
        with pytest.raises(SiteError, match=f"layer {layer} of .* has no entries that can leave"):
            vlmtok.compress(model, Held(Rule(layers=(layer,))))


@pytest.mark.parametrize(("name", "rule"), ruled(*some([*FAMILIES], ["stride, heads", "mass", "ragged"], every=3)))
def test_caches_hold_what_stayed(name, rule):
    """Columns of each layer: the longest row without what left it, and nothing else has changed."""
    model, inputs = shared(name, FAMILIES[name].attentions[0]), batch(name).inputs()
    table, real = gone(name, "rows", RULES[rule]), inputs["attention_mask"].bool()
    more = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    plain = cache_of(model.generate(**inputs, **more)).layers
    with vlmtok.compress(model, Held(RULES[rule])):
        held = cache_of(model.generate(**inputs, **more)).layers
    for layer, (one, other) in enumerate(zip(held, plain, strict=True)):
        if layer not in table:
            if getattr(other, "keys", None) is not None:
                assert one.keys.shape == other.keys.shape
            continue
        stays = real[:, None] & ~table[layer]
        assert one.keys.shape[2] == one.values.shape[2] == int(stays.sum(-1).max()) + 2
        for row in range(len(stays)):
            for head in range(one.keys.shape[1]):
                kept = stays[row, head if stays.shape[1] > 1 else 0].nonzero()[:, 0]
                mine = one.keys[row, head, one.keys.shape[2] - 2 - len(kept) : one.keys.shape[2] - 2]
                torch.testing.assert_close(mine, other.keys[row, head, kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HYBRID)
def test_patterns_of_a_release(name):
    """Sixteen layers, of which few keep keys."""
    rows, rule = FAMILIES[name].batch("3I2I6", "2J1I2I4"), Rule("attention_mass", 0.4, "head")
    inputs, model = rows.inputs(), deep(name, 16)
    table = gone_in(rule, deep(name, 16, "eager"), rows, inputs)
    assert_held_equals_hidden(model, rule, table, inputs)


def assert_held_equals_hidden(model, rule, table, inputs):
    with by_mask.hidden(model, table):
        wanted = generate(model, inputs, STEPS, use_cache=False)
    with vlmtok.compress(model, Held(rule)):
        found = generate(model, inputs, STEPS)
    assert (found[1] - wanted[1]).abs().max() <= NOISE
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_share_keys_see_what_stayed(attention):
    """Gemma 4 E2B's pattern: layers behind the fifteenth read keys of earlier ones."""
    rows, rule = FAMILIES["gemma4"].batch("3I2I6", "2J1I2I4"), Rule("attention_mass", 0.4)
    inputs, model = rows.inputs(), deep("gemma4", 20, attention)
    table = by_mask.for_readers(model, gone_in(rule, deep("gemma4", 20, "eager"), rows, inputs))
    assert len(table) > len(by_mask.storing_layers(model))
    assert_held_equals_hidden(model, rule, table, inputs)


# ---------------------------------------------------------------------- rows of a batch
@pytest.mark.parametrize(("name", "rule"), ruled(*some(USUAL, ["stride, heads", "mass", "ragged"], every=3)))
def test_a_batch_of_three_equals_three_of_one(name, rule):
    family = FAMILIES[name]
    patterns = family.several if family.prefix else (*family.rows, family.several[0])
    model, rows = shared(name, family.attentions[0]), family.batch(*patterns)
    with vlmtok.compress(model, Held(RULES[rule])):
        tokens, logits = generate(model, rows.inputs(), 3)
        for row in range(len(rows)):
            alone = generate(model, rows.alone(row).inputs(mask=False), 3)
            assert torch.equal(alone[0][0], tokens[row])
            assert (alone[1][0] - logits[row]).abs().max() <= NOISE
