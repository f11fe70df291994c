"""Every pair of a method and a family that attaches, at released depth: `forward` and `generate` equal the oracle.

The method decides on what it is shown, and the oracle takes the same decisions on a row of its own, with a tower by
loops: what a cut does to values, sizes, positions, caches and the layers behind it is held here. That what a method is
shown is right, signals above all, is held by the tests of signals, and what it decides by those of methods.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.checks import Print
from support.matrix import COUNTED, FLOOR, expected_families, spec_of
from support.methods import on_caches
from torch import Tensor

import vlmtok
from vlmtok.core.clips import ClipMethod
from vlmtok.lab.tiny import released

from .build import FAMILIES, TOWER_ONLY
from .harness import generate
from .oracle import Oracle, oracle
from .pairs import encoded_by_loops, recorded, said
from .prompts import Batch, Prompt
from .tower_replay import ROW_A_CROP, Replay

STEPS = 3
NOISE = 5e-4
"""How far logits may be apart: 32 layers and experts make more of what is rounded than the usual four."""
MOVED = 2e-2
"""How far a method must move them: what is compared could else not differ."""

SETTINGS = {
    **{(name, "averagepool"): "averagepool:overlap=true" for name in ("llava_next", "mistral3")},
    ("mistral3", "tokencorr"): "tokencorr:threshold=0.3",
}
"""Where defaults refuse a picture (grids of odd sides have no windows of equal size), or find nothing to take."""

TABLE = expected_families()
PAIRS = [(name, method) for method, row in TABLE.items() for name, said in row.items() if said.startswith("runs")]
PAIRS.sort()  # by family, so that a worker builds few models
IN_TOWER = [(name, method) for name, method in PAIRS if name in TOWER_ONLY]
IN_ROWS = [pair for pair in PAIRS if pair not in IN_TOWER]
ON_PICTURES = [
    pair for pair in IN_ROWS if not issubclass(vlmtok.method_class(pair[1]), ClipMethod) and not on_caches(pair[1])
]
"""Methods that take tokens of clips alone have loops of their own, in `test_clips`, those of caches in
`test_cache_pairs`."""


@functools.cache
def batch(name: str) -> Batch:
    """Rows with several pictures, one picture, and none where the family takes that."""
    family = {**FAMILIES, **TOWER_ONLY}[name]
    return family.batch(*(family.rows if name in TOWER_ONLY else family.several))


@functools.cache
def bare(name: str) -> Tensor:
    """First logits `[B, V]` of the bare model."""
    return generate(released.shared(name), batch(name).inputs(), 1)[1][:, 0]


@functools.cache
def plainly_encoded(name: str, row: int) -> dict[int, Any]:
    """What the bare tower makes of a row's pictures."""
    with torch.no_grad():
        return oracle(name, released.shared(name, "eager")).encode(batch(name).prompts[row])


def encoded(asked: Oracle, name: str, row: int, run: Any, heard: Any) -> tuple[Prompt, dict[int, Any]]:
    """A row and what its pictures become: by the bare tower, by loops, or, where pictures share a row, by the run."""
    prompt = batch(name).prompts[row]
    if not heard.tower:
        return prompt, plainly_encoded(name, row)
    if asked.model.config.model_type not in ROW_A_CROP:
        with torch.no_grad():
            return prompt, oracle(name, released.shared(name)).encode(prompt)
    return encoded_by_loops(asked, prompt, replay_of(asked.model, run, heard.tower))


def replay_of(model: Any, run: Any, events: Any) -> Replay:
    stage = run.layout.stages["vision"]
    proportional = any(method.proportional for method in run.methods)
    return Replay(model, events, stage.num_prefix, stage.last, stage.depth, proportional)


@pytest.mark.parametrize(("name", "method"), ON_PICTURES, ids=[" on ".join(pair[::-1]) for pair in ON_PICTURES])
def test_a_pair_that_attaches_equals_the_oracle(name: str, method: str) -> None:
    model, asked = released.shared(name), oracle(name, released.shared(name, "eager"))
    methods, rows = vlmtok.parse_methods(SETTINGS.get((name, method)) or spec_of(method)), batch(name)
    alone = rows.alone(0).inputs()
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        for cached, steps in ((False, 2), (True, STEPS)):
            with recorded(model, run) as heard:
                tokens, logits = generate(model, alone, steps, use_cache=cached)
            assert (heard.reduced or heard.skips) and not (cached and any(heard.passes[1:]))
            prompt, made = encoded(asked, name, 0, run, heard)
            passes = heard.passes[: 1 if cached else steps]
            words, wanted = said(asked, prompt, made, passes, run.layout, steps, heard.skips)
            assert (logits[0] - wanted).abs().max() <= NOISE
            assert torch.equal(tokens[0], words)
        first = wanted[0]
        assert (model(**alone).logits[0, -1] - first).abs().max() <= NOISE
        together = generate(model, rows.inputs(), 1)[1][:, 0]
        assert (together[0] - first).abs().max() <= NOISE
    assert (together[0] - bare(name)[0]).abs().max() > MOVED


@pytest.mark.parametrize(("name", "method"), IN_TOWER, ids=[" on ".join(pair[::-1]) for pair in IN_TOWER])
def test_a_pair_of_which_only_the_tower_is_cut_equals_loops(name: str, method: str) -> None:
    """Embeddings reach the language model without ids: the host itself goes on from what the tower gives."""
    model, eager = released.shared(name), released.shared(name, "eager")
    methods, inputs = vlmtok.parse_methods(spec_of(method)), batch(name).inputs()
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        with recorded(model, run) as heard:
            tokens, logits = generate(model, inputs, STEPS)
        made = model(**inputs).logits[:, -1]
        assert heard.reduced
    with torch.no_grad(), replay_of(eager, run, heard.tower).on():
        words, wanted = generate(eager, inputs, STEPS)
    assert (logits - wanted).abs().max() <= NOISE and torch.equal(tokens, words)
    assert (made - wanted[:, 0]).abs().max() <= NOISE
    assert (wanted[:, 0] - bare(name)).abs().max() > MOVED


@pytest.mark.parametrize("name", released.NAMES)
def test_a_model_at_released_depth_is_left_as_it_was(name: str) -> None:
    """Every method attached and taken off again; the pairs that attach are those that this file runs."""
    model = released.shared(name)
    before = Print.of(model)
    found = vlmtok.matrix(model)
    before.assert_still(model)
    assert [one.method for one in found.attaching] == sorted(method for family, method in PAIRS if family == name)


def test_every_pair_that_attaches_is_run() -> None:
    """None is left out in silence: those that run here are those that attach."""
    attach = {(one.model, one.method) for one in vlmtok.matrix().attaching}
    assert {*IN_ROWS, *IN_TOWER} == attach and len(PAIRS) == len(attach)


def test_the_count_of_pairs() -> None:
    counted = [pair for pair in PAIRS if pair[0] in COUNTED]
    assert len(COUNTED) == 19 and len(vlmtok.list_methods()) * 19 == 703
    assert len(counted) >= FLOOR
