"""Names that papers and their code have for parameters: read wherever a parameter's own name is, never written."""

from __future__ import annotations

import itertools
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.methods import METHODS, on_caches

import vlmtok
from vlmtok import parse_methods
from vlmtok.core import registry as core_registry
from vlmtok.core import spec as spec_strings
from vlmtok.core.aliases import Alias
from vlmtok.core.registry import method_class
from vlmtok.core.settings import format_value
from vlmtok.errors import ParameterError, SpecError, UnknownMethod

# As papers and their code write it, and what it is here.
READ = [
    ("fastv:R=0.5", "fastv"),
    ("fastv:R=0.9", "fastv:keep=0.1"),
    ("fastv:R=0.75:K=3", "fastv:K=3:keep=0.25"),
    ("fastv:R=0.123456789", "fastv:keep=0.876543211"),
    ("fastv:R=0", "fastv:keep=1.0"),
    ("fastv:fastv_k=3:fastv_r=0.7", "fastv:K=3:keep=0.3"),
    ("fastv:agg_layer=3:attention_rank=288", "fastv:K=3:keep=288"),
    ("pitome:r=0.95:m=0.5", "pitome:ratio=0.95:margin=0.5"),
    ("pitome:preset=deit:r=0.95", "pitome:ratio=0.95:margin=(0.75;0.75):protect=second_half:prop_attn=false"),
    ("pyramiddrop:lambda=0.5", "pyramiddrop"),
    ("pyramiddrop:lambda=0.7", "pyramiddrop:ratios=(0.7;0.49;0.343)"),
    ("pyramiddrop:lambda=0.3:layers=(4;8)", "pyramiddrop:layers=(4;8):ratios=(0.3;0.09)"),
    ("pyramiddrop:layer_list=[8,16]:image_token_ratio_list=[0.5,0.2]", "pyramiddrop:layers=[8;16]:ratios=[0.5;0.2]"),
    ("visionzip:dominant=54:contextual=10", "visionzip:keep=64:contextual=10"),
    ("visionzip:contextual=30:dominant=162", "visionzip:keep=192:contextual=30"),
    ("aim:l1=10:l2=20", "aim:first=10:last=20"),
    ("tca:R=0.7:M=2:lambda=4.0", "tca:ratio=0.7:reservoir_size=2:lambd=4.0"),
    ("divprune:ratio=0.2", "divprune:keep=0.2"),
    ("divprune:subset_ratio=0.2", "divprune:keep=0.2"),
    ("cdpruner:visual_token_num=64", "cdpruner:keep=64"),
    ("cdpruner:k=64", "cdpruner:keep=64"),
    ("scope:k=64", "scope:keep=64"),
    ("todre:k=58:threshold=0.05", "todre:keep=58:tau=0.05"),
    ("prumerge:k=16:reduction_ratio=0.125", "prumerge:keep=0.125:neighbours=16"),
    ("sparsevlm:retained_tokens=128", "sparsevlm:tokens=128"),
    ("dart:reduction_ratio=0.75", "dart:keep=0.25"),
    ("dart:max_num_trunction=64", "dart:keep=64"),
    ("fastervlm:visual_token_num=64", "fastervlm:keep=64"),
    ("hiprune:retention=64", "hiprune:keep=64"),
    ("holov:prune_rate=0.2:num_patches=8", "holov:keep=0.2:runs=8"),
    ("mmtok:k=64", "mmtok:keep=64"),
    ("vispruner:visual_token_num=64:important_ratio=0.75", "vispruner:keep=64:important=0.75"),
    ("evs:video_pruning_rate=0.5", "evs:rate=0.5"),
    ("evs:q=0.5", "evs:rate=0.5"),
    ("vidcom2:video_pruning_rate=0.5", "vidcom2:rate=0.5"),
    ("vidcom2:q=0.5", "vidcom2:rate=0.5"),
    ("prefixkv:ratio=0.8", "prefixkv:keep=0.2"),
    ("vidcom2:R_RATIO=0.1", "vidcom2:rate=0.9"),
    *((f"{name}:compression_ratio=0.75", f"{name}:keep=0.25") for name in METHODS if on_caches(name)),
]


@pytest.mark.parametrize(("typed", "written"), READ)
def test_names_of_the_papers_are_read_and_not_written(typed, written):
    assert "+".join(map(str, parse_methods(typed))) == written


def test_every_other_name_is_tried_here():
    tried = {(spec.partition(":")[0], key) for spec, _ in READ for key in re.findall(r":(\w+)=", spec)}
    for name in METHODS:
        for alias in method_class(name).aliases:
            assert (name, alias.name) in tried or not alias.parameter, (name, alias.name)


@given(st.decimals(0, 1, places=6).filter(lambda share: share < 1))
def test_the_share_that_goes_is_exact_to_the_last_decimal(share):
    (made,) = parse_methods(f"fastv:R={float(share)!r}")
    assert Decimal(repr(made.keep)) == 1 - Decimal(repr(float(share)))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fastv:R=1", "R=1 is not possible; it is the share of the tokens that goes, in [0, 1)"),
        ("fastv:R=50", "R=50 is not possible"),
        ("fastv:R=true", "R=True is not possible"),
        ("fastv:R=0.5:keep=0.5", "keep and R are one parameter"),
        ("fastv:R=0.5:fastv_r=0.5", "R and fastv_r are one parameter"),
        ("fastv:ratio=0.5", "no single parameter 'ratio': R is the share that goes, keep the share that stays"),
        ("crossget:r=8", "rv is that of the vision tower, rl that of the text tower"),
        ("pitome:r=8", "ratio=8 must be a number in [0, 1] (r stands for ratio)"),
        (
            "fastv:fastv_k=0:R=0.5",
            "in [1, inf] (R stands for keep = 1 - R; fastv_k stands for K)",
        ),
        ("pyramiddrop:lambda=0", "lambda=0 is not possible"),
        ("pyramiddrop:lambda=1.5", "lambda=1.5 must be a number in [0, 1]"),
        ("visionzip:dominant=54", "needs contextual as a count"),
        ("visionzip:dominant=0.5:contextual=10", "dominant=0.5 is a count"),
        ("fastv:keeep=0.5", "no parameter 'keeep'; did you mean 'keep'?"),
        ("fastv:KEEP=0.5", "did you mean 'keep'?"),
        ("fastv:k=2", "did you mean 'K'?"),
        ("todre:threshhold=0.1", "did you mean 'threshold'?"),
        ("todre:thresold=0.1", "did you mean 'threshold'?"),
        ("pitome:ration=0.9", "did you mean 'ratio'?"),
        ("transprune:ratio=0.5", "did you mean 'ratios'?"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said_in_the_words_that_were_typed(spec, says):
    with pytest.raises(ParameterError) as refusal:
        parse_methods(spec)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("fasttv", UnknownMethod, "did you mean 'fastv'"),
        ("pdrop", UnknownMethod, "did you mean 'pyramiddrop'"),
        ("pyramid-drop", SpecError, "did you mean 'pyramiddrop'?"),
        ("fastv keep=0.5", SpecError, "did you mean 'fastv'?"),
    ],
)
def test_an_unknown_method_gets_the_nearest(spec, error, says):
    with pytest.raises(error) as refusal:
        parse_methods(spec)
    assert says in str(refusal.value)


def test_other_names_work_in_python_and_in_sweeps():
    assert str(vlmtok.create_method("fastv", R=0.9)) == "fastv:keep=0.1"
    assert str(vlmtok.create_method("pyramiddrop", **{"lambda": 0.7})) == "pyramiddrop:ratios=(0.7;0.49;0.343)"
    swept = spec_strings.expand(" fastv : R = 0.25 , 0.5 + tome : r = 4 , 8 ")
    assert [str(one[0]) for one in map(parse_methods, swept)] == ["fastv:keep=0.75"] * 2 + ["fastv"] * 2
    assert [str(one[1]) for one in map(parse_methods, swept)] == ["tome:r=4", "tome"] * 2


def test_an_alias_stands_for_a_parameter_and_is_none():
    for alias in (Alias("keep", "K"), Alias("R", "nothing")):
        bad = type("Bad", (method_class("fastv"),), {"name": "bad", "aliases": (alias,)})
        with pytest.raises(ParameterError, match="must be no parameter, and stand for one"):
            core_registry.register_method(bad)
    assert "bad" not in core_registry._METHODS


# ---------------------------------------------------------------------- any spaces, any names
def _spelt(name):
    """A strategy of the parts of a spec string: some settings at their defaults, under any of their names."""
    made = vlmtok.create_method(name)
    names = {key: [key] for key in made.settings()}
    for alias in method_class(name).aliases:
        if alias.parameter and alias.convert is None:
            names[alias.parameter].append(alias.name)

    @st.composite
    def draw(choose):
        chosen = choose(st.lists(st.sampled_from(sorted(names)), unique=True)) if names else []
        parts = [name]
        for key in chosen:
            value = re.split(r"([;()\[\]])", format_value(made.settings()[key]))
            parts += [":", choose(st.sampled_from(names[key])), "=", *filter(None, value)]
        return parts

    return draw()


_METHOD = st.sampled_from(sorted(METHODS)).flatmap(_spelt)


@given(st.lists(_METHOD, min_size=1, max_size=3), st.data())
def test_specs_go_round_with_any_spaces_and_names(methods, data):
    tokens = list(itertools.chain.from_iterable(["+", *parts] for parts in methods))[1:]
    space = st.text(" \t", max_size=2)
    commas = data.draw(st.booleans())
    typed = "".join(data.draw(space) + ("," if commas and token == ";" else token) for token in tokens)
    made = parse_methods(typed + data.draw(space))
    assert [str(one) for one in made] == [parts[0] for parts in methods]  # all of it is the default
    again = parse_methods(" + ".join(map(str, made)))
    assert [one.settings() for one in again] == [one.settings() for one in made]
