"""VisionZip, PruMerge and SCOPE behind towers whose rows are padded, or end in a class token: against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlmtok
from vlmtok.core.settings import keep_count

from .build import FAMILIES, shared
from .harness import NOISE, STEPS, generate
from .methods import Look
from .oracle import oracle
from .padded_by_hand import CLASSED, of_shot
from .test_feature_methods import Slots, prumerge, visionzip

CASES = [("lfm2_vl", "2M3J5"), ("gemma4", "2I3J5"), ("gemma4", "2V3J4"), ("llama4", "2M3J5")]
"""A picture in tiles and a single one, two of different sizes, a clip beside a picture."""


def scope(x: Tensor, score: Tensor, flat: Tensor, keys: Tensor, wide: Tensor) -> Slots:
    """SCOPE on one part by loops: what adds most to the coverage of all, times its score."""
    unit = F.normalize(x.double(), dim=-1)
    alike, n = (unit @ unit.T).tolist(), len(x)
    cover, chosen = [0.0] * n, []
    for _ in range(keep_count(0.5, n)):
        gains = [sum(max(0.0, alike[i][j] - cover[i]) for i in range(n)) * float(score[j]) for j in range(n)]
        pick = max((j for j in range(n) if j not in chosen), key=lambda j: gains[j])
        chosen.append(pick)
        cover = [max(cover[i], alike[i][pick]) for i in range(n)]
    return {i: x[i] for i in chosen}


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
        written, rows = prompt.ids[:0], []
        for _ in range(STEPS):
            row = asked.row(prompt, written, encoded)
            whole = torch.cat([hidden, row.hidden[len(hidden) :]])
            kept = torch.cat([stays, torch.ones(len(written), dtype=torch.bool)]).nonzero()[:, 0]
            row = replace(row, hidden=whole).take(kept)
            rows.append(asked.logits(replace(row, positions=torch.arange(len(row))[None]), ()))
            written = torch.cat([written, rows[-1].argmax()[None]])
    assert merged == merges and not stays.all()
    with vlmtok.compress(model, vlmtok.create_method(method, **settings), trace=True) as run:
        for options in ({}, {"use_cache": False}):
            tokens, logits = generate(model, family.collect(prompt).inputs(), **options)
            assert (logits[0] - torch.stack(rows)).abs().max() <= NOISE
            assert torch.equal(tokens[0], written)
        left = int(stays.sum()) - sum(prompt.kinds == 0)
        assert run.report().visual("decoder")[1] == left
        assert sum(found.kept for found in run.trace().pictures) == left
        assert any("acts at 'projected'" in note for note in run.report().notes)


@pytest.mark.parametrize("method", ["visionzip:keep=0.5", "prumerge", "prumerge:plus=true", "scope:keep=0.5"])
@pytest.mark.parametrize(("name", "which"), [("lfm2_vl", "several"), ("gemma4", "clips"), ("llama4", "several")])
def test_a_batch_equals_its_rows(name: str, which: str, method: str) -> None:
    """Left padding, different pictures in the rows, beams."""
    family, model = FAMILIES[name], shared(name)
    batch = family.batch(*getattr(family, which))
    with vlmtok.compress(model, method):
        tokens, logits = generate(model, batch.inputs())
        for i, prompt in enumerate(batch.prompts):
            alone, one = generate(model, family.collect(prompt).inputs())
            assert torch.equal(alone[0], tokens[i])
            assert (one[0] - logits[i]).abs().max() <= NOISE
        if family.beams:
            model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False, num_beams=2)
