"""Stacks of two and three methods: a batch is its rows, and both are what the oracle says.

Single methods are held to this elsewhere; here they stand on each other, drawn from the registry.
"""

from __future__ import annotations

import functools

import models
import pytest
import torch
from checks import assert_equal
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from models import Batch
from test_llava import Top, assert_generates_as_the_oracle

import vlmtok
from vlmtok import Reduction
from vlmtok.errors import ParameterError, SiteError
from vlmtok.rows import Picture, Rows

STEPS = 3
SETTINGS = {
    "aim": ("aim:passes=1:first=2:last=4", "aim:prune=false", "aim:passes=0:first=1:last=3"),
    "averagepool": ("averagepool:output_size=(2;2)", "averagepool:output_size=(2;4):positions=keep"),
    "cdpruner": ("cdpruner:keep=0.6", "cdpruner:keep=5:positions=keep"),
    "crossget": ("crossget:rv=2", "crossget:preset=llava:rv=3"),
    "divprune": ("divprune:keep=0.7", "divprune:keep=5:positions=keep"),
    "fastv": ("fastv:K=1:keep=4", "fastv:K=2:keep=0.5", "fastv:K=4:keep=6:positions=renumber"),
    "pitome": ("pitome:ratio=0.8", "pitome:preset=llava:ratio=0.8"),
    "prumerge": ("prumerge:keep=none", "prumerge:keep=0.5"),
    "pyramiddrop": (
        "pyramiddrop:layers=(3;):ratios=(0.125;)",
        "pyramiddrop:layers=(2;4):ratios=(0.6;0.3):positions=keep",
    ),
    "random": ("random:keep=0.7:stage=vision:layer=0", "random:keep=0.6", "random:keep=5:stage=decoder:layer=3"),
    "scope": ("scope:keep=0.6",),
    "sparsevlm": (
        "sparsevlm:tokens=192:layers=(2;4):budgets=(5;3)",
        "sparsevlm:tokens=192:layers=(3;):budgets=(6;):positions=keep",
    ),
    "tca": ("tca:ratio=0.6:update=false",),
    "todre": ("todre:keep=0.6:tau=none", "todre:keep=0.8:tau=0.7:check_layer=3", "todre:keep=5:tau=0.5:check_layer=1"),
    "tome": ("tome:r=2", "tome:r=3:prop_attn=false"),
    "transprune": (
        "transprune:layers=(3;4;5):accumulate=none",
        "transprune:layers=(2;4):ratios=(0.6;0.3):positions=keep",
    ),
    "visionzip": ("visionzip:keep=0.5",),
}
"""Settings by which methods act in a tower of three layers and a language model of six."""
PATTERNS = ("^3I5", "2I1I2", "^2I1I4", "6", "^4I", "^1II3", "3II", "2I3I1I2", "I4", "^2I1I")
"""Text around a picture, inside a sample's pictures, none of either, pictures side by side and at the end."""


def test_every_method_has_settings_here():
    assert sorted(SETTINGS) == vlmtok.list_methods()
    for name, specs in SETTINGS.items():
        assert all(type(method).spec_name() == name for spec in specs for method in vlmtok.parse_methods(spec))


@functools.cache
def llava(attention="sdpa"):
    return models.llava(attention, depth=6)


def stacks(names):
    """Two or three settings, no two of one method."""
    return st.lists(st.sampled_from(sorted(names)), min_size=2, max_size=3, unique=True).flatmap(
        lambda drawn: st.tuples(*(st.sampled_from(SETTINGS[name]) for name in drawn)).map("+".join)
    )


def batches():
    rows = st.lists(st.sampled_from(PATTERNS), min_size=2, max_size=4)
    return rows.filter(lambda drawn: any("I" in pattern for pattern in drawn))


def attach(model, spec):
    """The compression, or None where the model refuses the stack."""
    try:
        return vlmtok.compress(model, spec)
    except SiteError:
        return None


def generated(model, inputs, steps=STEPS, **more):
    options = {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**inputs, **{**options, **more})
    return found.sequences[:, -steps:], torch.stack(found.logits, 1)


# ---------------------------------------------------------------------- a batch is its rows
RENUMBERED_ALONE = {"spec": "fastv:K=1:keep=4+pyramiddrop:layers=(3;):ratios=(0.125;)", "patterns": ["^3I5", "2I1I2"]}
"""One row has gaps, and only the other one loses tokens where gaps are closed."""


@pytest.mark.parametrize("side", ["left", "right"])
@example(**RENUMBERED_ALONE, seed=0)
@settings(max_examples=40, phases=(Phase.explicit, Phase.generate))
@given(spec=stacks(SETTINGS), patterns=batches(), seed=st.integers(0, 5))
def test_a_batch_of_a_stack_is_its_rows(side, spec, patterns, seed):
    """3, with padding on either side: logits of every column, and of what is generated behind the left-padded."""
    model, batch = llava(), Batch.of(*patterns, seed=seed)
    run = attach(model, spec)
    if run is None:
        return
    with run, torch.no_grad():
        try:
            whole = model(**batch.inputs(side=side)).logits
        except ParameterError as refusal:  # average pooling behind a cut
            assert "grid" in str(refusal)
            return
        behind = generated(model, batch.inputs())[1] if side == "left" else None
        for row in range(len(batch)):
            alone, length = batch.alone(row), len(batch.rows[row])
            mine = whole[row, -length:] if side == "left" else whole[row, :length]
            assert_equal(mine, model(**alone.inputs(mask=False)).logits[0], what=f"row {row}")
            if behind is not None:
                assert_equal(behind[row], generated(model, alone.inputs(mask=False))[1][0], what=f"answer of row {row}")


# ---------------------------------------------------------------------- what one row loses is no business of the others
KEPT_THEN_RENUMBERED = [Top(4, positions="keep"), Top(6, "decoder", 2, positions="renumber", scope="sample")]
"""Four of each picture stay; where that makes more than six, six do, and only there gaps close."""


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_that_lose_nothing_keep_their_gaps_and_the_hosts_count(attention, cached):
    """Rows that end with their picture lost the last position: what is written goes on where the host counts."""
    batch = Batch.of("^3I2I5", "^4I", "^3I5", "^2I", "^6I", "6")
    assert_generates_as_the_oracle(llava(attention), batch, KEPT_THEN_RENUMBERED, cached)


def test_position_ids_of_each_row():
    """Two rows of six: the first has a gap and loses one more, the second has a gap and loses nothing."""
    label = torch.tensor([[-1, 0, 0, 0, -1, -1], [-1, 0, 0, -1, -1, -1]])
    positions = torch.tensor([[0, 1, 3, 5, 6, 7], [4, 5, 8, 9, 10, 11]])
    pictures = [Picture(0, 0, [1, 2, 3], n=3, entered=3), Picture(1, 0, [1, 2], n=2, entered=2)]
    place = torch.arange(6).expand(2, 6)
    rows = Rows(2, 6, [6, 6], pictures, label, None, None, place, positions)
    pieces = [(group, Reduction(torch.arange(2)[None])) for group in rows.groups("picture")]
    assert len(pieces) == 2
    _, moved = rows.cut(torch.zeros(2, 6, 1), pieces, renumber=True)
    assert moved.dropped.tolist() == [1, 0]
    assert rows.positions[0, 1:].tolist() == [0, 1, 2, 3, 4]
    assert rows.positions[1].tolist() == [4, 5, 8, 9, 10, 11]
