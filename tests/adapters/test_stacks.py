"""Stacks of two and three methods: a batch is its rows, and both are what the oracle says.

Single methods are held to this elsewhere; here they stand on each other, drawn from the registry.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from support import models
from support.checks import assert_equal
from support.hosts_of import cache_of, with_cache
from support.llava_by_oracle import Top, assert_generates_as_the_oracle
from support.models import Batch
from support.towers_by_oracle import ODD, assert_tower_equals_the_oracle, tower_of

import vlmtok
from vlmtok import Reduction, Site, TokenView
from vlmtok.core.pictures import Picture
from vlmtok.core.rows import PromptRows
from vlmtok.errors import MissingSignal, ParameterError, SiteError

STEPS = 3
SETTINGS = {
    "aim": ("aim:passes=1:first=2:last=4", "aim:prune=false", "aim:passes=0:first=1:last=3"),
    "averagepool": ("averagepool:output_size=(2;2)", "averagepool:output_size=(2;4):positions=keep"),
    "cdpruner": ("cdpruner:keep=0.6", "cdpruner:keep=5:positions=keep"),
    "corematching": ("corematching:keep=0.7:layer=2", "corematching:layer=3:positions=renumber"),
    "crossget": ("crossget:rv=2", "crossget:preset=llava:rv=3"),
    "dart": ("dart:keep=0.7:pivots=(1;1)", "dart:K=3:keep=5:pivots=(1;1)", "dart:at=embeddings:keep=0.7"),
    "divprune": ("divprune:keep=0.7", "divprune:keep=5:positions=keep"),
    "ems_style": ("ems_style:keep=0.6:window=2", "ems_style:keep=3:window=3:tau=-1.0"),
    "evs": ("evs:source=pictures:rate=0.3",),
    "fastervlm": ("fastervlm:keep=0.7",),
    "fastv": ("fastv:K=1:keep=4", "fastv:K=2:keep=0.5", "fastv:K=4:keep=6:positions=renumber"),
    "grid": ("grid:keep=0.6", "grid:keep=5:positions=keep"),
    "hiprune": ("hiprune:keep=0.7",),
    "holov": ("holov:keep=0.7:runs=2",),
    "ima": ("ima", "ima:part=block:interval=3"),
    "kv_norm": ("kv_norm:keep=0.6",),
    "kv_random": ("kv_random:keep=0.6:layers=(0;3)", "kv_random:keep=3:scope=sample"),
    "learned": ("learned:keep=0.7", "learned:keep=5:positions=keep"),
    "mmtok": ("mmtok:keep=0.7", "mmtok:keep=5:vision=projected:positions=keep"),
    "pitome": ("pitome:ratio=0.8", "pitome:preset=llava:ratio=0.8"),
    "prefixkv": ("prefixkv:keep=0.6",),
    "prumerge": ("prumerge:keep=none", "prumerge:keep=0.5"),
    "pyramiddrop": (
        "pyramiddrop:layers=(3;):ratios=(0.125;)",
        "pyramiddrop:layers=(2;4):ratios=(0.6;0.3):positions=keep",
        "pyramiddrop:layers=(2;4):ratios=(0.6;0.3):forget=true",
    ),
    "random": ("random:keep=0.7:stage=vision:layer=0", "random:keep=0.6", "random:keep=5:stage=decoder:layer=3"),
    "scope": ("scope:keep=0.6",),
    "snapkv": ("snapkv:keep=0.6:window=2", "snapkv:keep=3:window=3:scope=picture"),
    "sparsevlm": (
        "sparsevlm:tokens=192:layers=(2;4):budgets=(5;3)",
        "sparsevlm:tokens=192:layers=(3;):budgets=(6;):positions=keep",
    ),
    "streaming": ("streaming:sinks=1:keep=0.6",),
    "tca": ("tca:ratio=0.6:update=false",),
    "todre": ("todre:keep=0.6:tau=none", "todre:keep=0.8:tau=0.7:check_layer=3", "todre:keep=5:tau=0.5:check_layer=1"),
    "tokencorr": ("tokencorr:keep=0.7",),
    "tome": ("tome:r=2", "tome:r=3:prop_attn=false"),
    "transprune": (
        "transprune:layers=(3;4;5):accumulate=none",
        "transprune:layers=(2;4):ratios=(0.6;0.3):positions=keep",
    ),
    "vidcom2": ("vidcom2:source=pictures:rate=0.3",),
    "visionzip": ("visionzip:keep=0.5",),
    "vispruner": ("vispruner:keep=0.7",),
}
"""Settings by which methods act in a tower of three layers and a language model of six."""
WHOLE = {"averagepool", "evs", "vidcom2"}
"""Methods that need pictures, or frames, of which nothing is gone yet."""
PATTERNS = ("^3I5", "2I1I2", "^2I1I4", "6", "^4I", "^1II3", "3II", "2I3I1I2", "I4", "^2I1I")
"""Text around a picture, inside a sample's pictures, none of either, pictures side by side and at the end."""


def test_every_method_has_settings_here():
    wanting = {name for name in vlmtok.list_methods() if vlmtok.method_class(name).wants}  # signals of a user's own
    assert sorted({*SETTINGS, *wanting}) == vlmtok.list_methods() and not wanting & set(SETTINGS)
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


def positioned(inputs):
    """Inputs with the positions that rows have alone: norms of turned keys, by which DART chooses, hang on them."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
@example(**RENUMBERED_ALONE, seed=0)
@settings(max_examples=30, phases=(Phase.explicit, Phase.generate))
@given(spec=stacks(SETTINGS), patterns=batches(), seed=st.integers(0, 5))
def test_a_batch_of_a_stack_is_its_rows(side, spec, patterns, seed):
    """3, with padding on either side: logits of every column, and of what is generated behind the left-padded."""
    model, batch = llava(), Batch.of(*patterns, seed=seed)
    run = attach(model, spec)
    if run is None:
        return
    with run, torch.no_grad():
        try:
            whole = model(**positioned(batch.inputs(side=side))).logits
        except ParameterError as refusal:
            assert WHOLE & {one.spec_name() for one in vlmtok.parse_methods(spec)}
            assert "grid" in str(refusal) or "whole frames" in str(refusal)
            return
        behind = generated(model, batch.inputs())[1] if side == "left" else None
        for row in range(len(batch)):
            alone, length = batch.alone(row), len(batch.rows[row])
            mine = whole[row, -length:] if side == "left" else whole[row, :length]
            assert_equal(mine, model(**alone.inputs(mask=False)).logits[0], what=f"row {row}")
            if behind is not None:
                assert_equal(behind[row], generated(model, alone.inputs(mask=False))[1][0], what=f"answer of row {row}")


def two_turns(model, batch, new):
    """Logits of the answers to a prompt and to a second one with a new picture, on one cache, with the new ids only."""
    first = batch.inputs()
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one = model.generate(**first, max_new_tokens=STEPS, **options)
    ids = torch.cat([one.sequences[:, -1:], torch.stack(new.rows)], 1)
    seen = torch.ones(len(batch), STEPS - 1 + ids.shape[1], dtype=torch.int64)
    two = model.generate(
        input_ids=ids,
        attention_mask=torch.cat([first["attention_mask"], seen], 1),
        pixel_values=new.inputs()["pixel_values"],
        **with_cache(model, cache_of(one)),
        max_new_tokens=STEPS,
        **options,
    )
    return torch.cat([torch.stack(one.logits, 1), torch.stack(two.logits, 1)], 1)


@example(**RENUMBERED_ALONE, seed=0)
@settings(max_examples=16, phases=(Phase.explicit, Phase.generate))
@given(spec=stacks(set(SETTINGS) - WHOLE), patterns=batches(), seed=st.integers(0, 5))
def test_two_turns_of_a_batch_are_those_of_its_rows(spec, patterns, seed):
    """Cuts of both turns, the second with a picture of its own; rows without a picture get their first one there."""
    model, batch = llava(), Batch.of(*patterns, seed=seed)
    run = attach(model, spec)
    if run is None:
        return
    new = Batch.of(*("2I3", "1I4", "3I2", "4I1")[: len(batch)], seed=seed + 7)  # of equal length
    with run, torch.no_grad():
        whole = two_turns(model, batch, new)
        for row in range(len(batch)):
            assert_equal(whole[row], two_turns(model, batch.alone(row), new.alone(row))[0], what=f"row {row}")


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
    rows = PromptRows(2, 6, [6, 6], pictures, label, None, None, place, positions)
    pieces = [(group, Reduction(torch.arange(2)[None])) for group in rows.groups("picture")]
    assert len(pieces) == 2
    _, moved = rows.cut(torch.zeros(2, 6, 1), pieces, renumber=True)
    assert moved.dropped.tolist() == [1, 0]
    assert rows.positions[0, 1:].tolist() == [0, 1, 2, 3, 4]
    assert rows.positions[1].tolist() == [4, 5, 8, 9, 10, 11]


# ---------------------------------------------------------------------- the oracle
@settings(max_examples=14, phases=(Phase.explicit, Phase.generate))
@given(
    spec=stacks(set(SETTINGS) - WHOLE),
    patterns=batches(),
    seed=st.integers(0, 5),
    attention=st.sampled_from(["sdpa", "eager"]),
    cached=st.booleans(),
)
def test_stacks_equal_the_oracle(spec, patterns, seed, attention, cached):
    """5: a layer loop without cache, padding or hooks, row by row."""
    model, batch = llava(attention), Batch.of(*patterns, seed=seed)
    try:
        assert_generates_as_the_oracle(model, batch, vlmtok.parse_methods(spec), cached)
    except SiteError as refusal:
        assert "behind prumerge" in str(refusal) or "one method chooses what a layer's cache holds" in str(refusal)


COMBINED = {
    "two methods at one boundary, inserted tokens of both": "crossget:rv=2+crossget:preset=llava:rv=3",
    "ragged, then signals of the tower": "prumerge:keep=none+todre:keep=0.6:tau=none+cdpruner:keep=0.8",
    "merged in the tower, ragged in the decoder": "tome:r=3+todre:keep=none:tau=0.9:check_layer=1+fastv:K=4:keep=0.5",
    "two renumbering cuts": "pyramiddrop:layers=(2;4):ratios=(0.5;0.2)+fastv:K=3:keep=0.6:positions=renumber",
    "kept, renumbered, kept": (
        "divprune:keep=0.7:positions=keep+pyramiddrop:layers=(2;):ratios=(0.6;)+fastv:K=4:keep=0.5"
    ),
    "carried state and two other cuts": (
        "transprune:layers=(3;4;5):accumulate=none+fastv:K=2:keep=0.8+random:keep=0.8:stage=decoder:layer=4"
    ),
    "frames, then a cut of each": "evs:source=pictures:rate=0.3+fastv:K=2:keep=0.6",
    "frames, then work that is left out": "vidcom2:source=pictures:rate=0.3+ima:part=block:interval=3",
    "weighted slots, then another method": "sparsevlm:tokens=192:layers=(1;3):budgets=(6;4)+fastv:K=3:keep=0.7",
}


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("stack", COMBINED)
def test_combinations_equal_the_oracle(stack, cached):
    batch = Batch.of("^3I5", "2I1I2", "^4I", "6", "^1II")
    assert_generates_as_the_oracle(llava(), batch, vlmtok.parse_methods(COMBINED[stack]), cached)


def test_a_ragged_method_is_the_last_at_features():
    with pytest.raises(SiteError, match="SCOPE cannot act at features behind prumerge, which leaves"):
        vlmtok.compress(llava(), "prumerge:keep=none+scope:keep=0.6")
    batch = Batch.of("^3I5", "2I1I2", "^4I")
    assert_generates_as_the_oracle(llava(), batch, vlmtok.parse_methods("scope:keep=0.8+prumerge:keep=none"))


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_protection_changes_behind_the_larger_half(depth):
    """One half of the released layers is l < ceil(L / 2); odd depths tell it from floor."""
    x = torch.randn(1, 12, 8)
    for protect, first in (("first_half", True), ("second_half", False)):
        for layer in range(depth):
            view = TokenView(x, Site("vision", layer, "mid"), depth=depth, signals={"keys": x})
            like = "all" if (layer < (depth + 1) // 2) == first else "none"
            found, wanted = (vlmtok.PiToMe(ratio=0.8, protect=how).reduce(view) for how in (protect, like))
            assert torch.equal(found.keep, wanted.keep)
        other = vlmtok.PiToMe(ratio=0.8, protect="none" if like == "all" else "all").reduce(view)
        assert not torch.equal(found.keep, other.keep)


# ---------------------------------------------------------------------- towers
IN_TOWERS = {
    "crossget": ("crossget:rv=3", "crossget:rv=4:guidance=attention"),
    "pitome": (
        "pitome:ratio=0.85",
        "pitome:ratio=0.9:protect=first_half",
        "pitome:ratio=0.9:protect=second_half:prop_attn=false",
        "pitome:preset=llava:ratio=0.9",
    ),
    "random": ("random:keep=0.8:stage=vision:layer=0", "random:keep=7:stage=vision:layer=1"),
    "tca": ("tca:ratio=0.8:update=false",),
    "tome": ("tome:r=2", "tome:r=3:prop_attn=false"),
}


def tower_stacks():
    return st.lists(st.sampled_from(sorted(IN_TOWERS)), min_size=2, max_size=3).flatmap(
        lambda drawn: st.tuples(*(st.sampled_from(IN_TOWERS[name]) for name in drawn)).map("+".join)
    )


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))
@given(
    name=st.sampled_from((*ODD, "timm AugReg", "timm DeiT distilled", "timm PE", "open_clip CLIP", "HF SigLIP vision")),
    spec=tower_stacks(),
    seed=st.integers(0, 5),
)
def test_stacks_in_towers_equal_the_oracle(name, spec, seed):
    """Odd and oblong grids, odd depths, rotary tables, no, one, two and five protected tokens; row by row."""
    try:
        assert_tower_equals_the_oracle(name, spec, seed)
    except (MissingSignal, ParameterError, SiteError) as refusal:
        assert "SigLIP" in name or tower_of(name)[0].prefix == 0, refusal


@pytest.mark.parametrize("name", ["EVA-02 5 x 3", "ViT 7 x 3"])
@pytest.mark.parametrize(
    "spec",
    [
        "tome:r=1+pitome:ratio=0.9+crossget:rv=1",
        "crossget:rv=1+tca:ratio=0.9:update=false+tome:r=1",
        "random:keep=0.8:stage=vision:layer=1+tome:r=2",
    ],
)
def test_three_cuts_in_one_block(name, spec):
    """Rotary tables, sizes and inserted tokens of two methods follow all of them."""
    assert_tower_equals_the_oracle(name, spec, 3)
