"""Second turns with a picture of their own on caches that lost entries, in every form of positions; and drafts."""

from __future__ import annotations

import pytest
import torch
from support import cache_by_mask as by_mask
from support.cache_choices import Rule, gone_of, heard, units_of
from support.cache_methods import Held
from support.hosts_of import cache_of, with_cache
from support.sweep import some

import vlmtok
from vlmtok.errors import CacheError

from .build import FAMILIES, shared
from .harness import BY_CROP, NOISE, batch, generate
from .oracle import oracle
from .prompts import Prompt, padded

FAMILIES_OF_TURNS = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "internvl"),
    *("mistral3", "gemma3", "gemma4", "lfm2_vl", "smolvlm", "paddleocr_vl", "ovis2"),
)
PAIRABLE = [name for name in FAMILIES_OF_TURNS if name != "llava_onevision"]
"""LLaVA-OneVision makes other features of pictures that share a prompt than of one alone."""
RULES = {
    "places": Rule(keep=0.5),
    "places of heads": Rule(keep=0.4, scope="head"),
    "of the sample": Rule(keep=0.3, scope="sample"),
}
WRITTEN = 4


def positions_of(name, prompts, more=0):
    """Position ids of a left-padded batch, `[B, S]` or `[3, B, S]`."""
    asked = oracle(name, shared(name, "eager"))
    rows = [asked.positions(prompt, more) for prompt in prompts]
    table = torch.stack([padded([row[axis] for row in rows]) for axis in range(len(rows[0]))])
    return table[0] if len(table) == 1 else table


def gone_from(name, rule, whole, first):
    """What left behind the pictures of whole conversations, from number `first` on: by layer, bool `[B, H, S]`."""
    inputs = FAMILIES[name].collect(*whole).inputs()
    length, rows, visual = inputs["input_ids"].shape[1], [], []
    for prompt in whole:
        moved = length - len(prompt.ids)
        new = Prompt(prompt.ids, prompt.pictures[first:])
        rows.append([columns + moved for columns in units_of(new, rule.scope, name in BY_CROP)])
        visual.append((prompt.owner >= 0).nonzero()[:, 0] + moved)
    model = shared(name, "eager")
    return gone_of(rule, heard(model, inputs), rows, visual, list(by_mask.storing_layers(model)))


@pytest.mark.parametrize(("name", "rule"), some(PAIRABLE, [*RULES], every=2))
def test_a_second_turn_with_a_picture(name, rule):
    """By hand, with positions; a token more is written behind it."""
    family, model, rule = FAMILIES[name], shared(name, FAMILIES[name].attentions[0]), RULES[rule]
    first = batch(name)
    inputs = first.inputs()
    start = inputs["input_ids"].shape[1]
    new = tuple(family.prompt("2I3", 50 + row) for row in range(2))
    with vlmtok.compress(model, Held(rule)), torch.no_grad():
        one = model.generate(**inputs, max_new_tokens=WRITTEN, do_sample=False, return_dict_in_generate=True)
        said = one.sequences[:, -WRITTEN:]
        whole = tuple(p.then(q, w) for p, q, w in zip(first.prompts, new, said))
        full, second = family.collect(*whole).inputs(), family.collect(*new).inputs(mask=False)
        second["input_ids"] = torch.cat([said[:, -1:], second["input_ids"]], 1)
        second["attention_mask"] = full["attention_mask"]
        second.pop(family.types, None)
        if family.types is not None and family.positions == "1d":
            second[family.types] = full[family.types]
        places, width = positions_of(name, whole, 1), second["input_ids"].shape[1]
        at = places[..., start + WRITTEN - 1 : start + WRITTEN - 1 + width]
        out = model(**second, position_ids=at, **with_cache(model, cache_of(one)), use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([full["attention_mask"], torch.ones_like(token)], 1)
        step = {"input_ids": token, "attention_mask": mask, "position_ids": places[..., -1:]}
        more = model(**step, **with_cache(model, cache_of(out)), use_cache=True)
    tables = [gone_from(name, rule, first.prompts, 0), gone_from(name, rule, whole, 1)]
    tables = [by_mask.for_readers(model, table) for table in tables]
    with by_mask.hidden(model, *tables):
        wanted = generate(model, full, 2, use_cache=False)
    assert (out.logits[:, -1] - wanted[1][:, 0]).abs().max() <= NOISE
    assert torch.equal(token, wanted[0][:, :1])
    assert (more.logits[:, -1] - wanted[1][:, 1]).abs().max() <= NOISE


@pytest.mark.parametrize("name", FAMILIES_OF_TURNS)
def test_a_second_turn_with_all_ids_is_refused(name):
    """Hosts slice full ids by what the first layer with a length holds: right where nothing left it, else said."""
    model, rows = shared(name, FAMILIES[name].attentions[0]), batch(name)
    more = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with vlmtok.compress(model, Held(Rule(keep=0.5))):
        out = model.generate(**rows.inputs(), **more)
        held, length = cache_of(out).get_seq_length(), out.sequences.shape[1]
        mask = torch.cat([rows.inputs()["attention_mask"], out.sequences.new_ones(2, 4)], 1)
        given = {"attention_mask": mask, **with_cache(model, cache_of(out)), **more}
        if held == length - 1:  # a window in front of the others counts all that came
            assert "sliding_attention" in by_mask.kinds_of(model)[: min(by_mask.storing_layers(model))]
            found = model.generate(input_ids=out.sequences, **given).sequences
            more["max_new_tokens"] = 8
            assert torch.equal(found, model.generate(**rows.inputs(), **more).sequences)
            return
        with pytest.raises(CacheError, match="new ids"):
            model.generate(input_ids=out.sequences, **given)
