"""VisionZip, PruMerge and SCOPE behind towers whose rows are padded, or end in a class token: against plain loops."""

from __future__ import annotations

import pytest
import torch

import vlmtok

from .build import FAMILIES, shared
from .harness import generate
from .methods import Look
from .oracle import oracle
from .padded_by_hand import CLASSED, of_shot
from .test_feature_methods import assert_answers, assert_batch, prumerge, scope, visionzip

CASES = [("lfm2_vl", "2M3J5"), ("gemma4", "2I3J5"), ("gemma4", "2V3J4"), ("llama4", "2M3J5")]
"""A picture in tiles and a single one, two of different sizes, a clip beside a picture."""


METHODS = {
    "visionzip": (visionzip, {"keep": 0.5}, True),
    "prumerge": (prumerge, {}, True),
    "scope": (scope, {"keep": 0.5}, False),
}


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_plain_loops(name: str, pattern: str, method: str) -> None:
    """Answers equal the oracle's on the tokens that loops keep and merge, with a cache and without."""
    family, model = FAMILIES[name], shared(name)
    by_loops, settings, merges = METHODS[method]
    prompt = family.prompt(pattern, 3)
    look = Look("picture")
    with vlmtok.compress(model, look):
        generate(model, family.collect(prompt).inputs(), 1)
    asked = oracle(name, shared(name, "eager"))
    score_of = "cls_attention" if name in CLASSED else "received_attention"
    merged = False
    with torch.no_grad():
        encoded = asked.encode(prompt)
        hidden = asked.row(prompt, prompt.ids[:0], encoded).hidden.clone()
        stays = torch.ones(len(prompt.ids), dtype=torch.bool)
        known = {int(column): i for i, column in enumerate(torch.cat([p.columns for p in prompt.pictures]))}
        parts = [of_shot(name, picture.shot) for picture in prompt.pictures]
        made = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for seen in look.seen:
            for part in set(seen.part.tolist()):
                columns = seen.columns[seen.part == part]
                here, before = [known[int(column)] for column in columns], hidden[columns]
                score, flat = made[score_of][here].sum(-1), made["flat_attention"][here, 0]
                slots = by_loops(before, score, flat, made["turned_keys"][here], made["turned_keys_full"][here])
                stays[columns] = False
                for place, token in slots.items():
                    merged |= not torch.equal(token, before[place])
                    stays[columns[place]] = True
                    hidden[columns[place]] = token
    assert merged == merges and not stays.all()
    assert_answers(name, prompt, vlmtok.create_method(method, **settings), asked, encoded, hidden, stays)


@pytest.mark.parametrize(
    "method", ["visionzip:keep=0.5", "prumerge", "prumerge:plus=true", "scope:keep=0.5", "mmtok:keep=0.5"]
)
@pytest.mark.parametrize(("name", "which"), [("lfm2_vl", "several"), ("gemma4", "clips"), ("llama4", "several")])
def test_a_batch_equals_its_rows(name: str, which: str, method: str) -> None:
    """Left padding, different pictures in the rows, beams."""
    assert_batch(name, which, method)
