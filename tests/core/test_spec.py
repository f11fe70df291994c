"""Spec strings: whatever they say is read as it was written, or refused in one clear line."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.methods import METHODS, Anything

import vlmtok
from vlmtok import parse_methods
from vlmtok.core import registry as core_registry
from vlmtok.core import settings
from vlmtok.core import spec as spec_strings
from vlmtok.errors import (
    ParameterError,
    SpecError,
    UnknownMethod,
    VlmtokError,
)

numbers = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(string.ascii_letters + string.digits + "_./@-", max_size=8).map("w".__add__)
words = words.filter(lambda word: word.lower() not in ("true", "false", "none"))
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


def exactly(one, other):
    """Equal in type too, through lists and tuples."""
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(exactly, one, other))
    return type(one) is type(other) and one == other


@given(a=values, b=values)
def test_any_value_goes_round(a, b):
    known = core_registry._METHODS
    known["anything"] = Anything
    try:
        spec = f"{Anything(a, b)}+{Anything(b)}"
        one, other = parse_methods(spec)
    finally:
        del known["anything"]
    assert exactly(one.a, a) and exactly(one.b, b)
    assert exactly(other.a, b) and other.b is None
    assert "," not in spec and " " not in spec


@pytest.mark.parametrize("name", METHODS)
def test_settings_go_round(name):
    """Every setting, also one that is spelt out and equals the default."""
    made = vlmtok.create_method(name)
    spelt = ":".join([name, *(f"{key}={settings.format_value(value)}" for key, value in made.settings().items())])
    (found,) = parse_methods(spelt)
    assert exactly(list(found.settings().items()), list(made.settings().items()))
    assert str(found) == name


@pytest.mark.parametrize(
    "spec",
    [
        "todre:keep=1",
        "todre:keep=1.0",
        "todre:keep=0.2:tau=none",
        "tome:r=[8;6;4;2]",
        "tome:r=(16;-1)",
        "tome:r=16:prop_attn=false",
        "pitome:ratio=[0.9;0.95]:margin=(0.75;0.75)",
        "transprune:layers=(3;4;5)+divprune:keep=0.6",
        "random:keep=0.25:stage=decoder:layer=-3",
        "fastv:K=3:keep=64+pitome:ratio=0.95",
    ],
)
def test_specs_are_written_as_they_are_read(spec):
    assert "+".join(map(str, parse_methods(spec))) == spec


def test_values_of_each_kind():
    values = dict(
        pair.split("->")
        for pair in ("1->int", "1.0->float", "1e-3->float", "+2->int", "-.5->float", "True->bool", "NONE->NoneType")
    )
    for text, kind in values.items():
        assert type(spec_strings.parse_value(text, "")).__name__ == kind, text
    assert spec_strings.parse_value("(1;)", "") == (1,)
    assert spec_strings.parse_value("()", "") == ()
    assert spec_strings.parse_value("[(1;a);[none;2.5]]", "") == [(1, "a"), [None, 2.5]]
    assert parse_methods("tome:r=[1;2]")[0].r == [1, 2]
    assert parse_methods("tome:r=(4;-1)")[0].r == (4, -1)
    assert parse_methods("TOME:r=4")[0].r == 4, "names in capitals"
    assert parse_methods("pitome:preset=deit:ratio=0.95")[0].margin == (0.75, 0.75)
    # A plus is a separator only before a letter and outside values.
    assert parse_methods("todre:keep=+0.5")[0].keep == 0.5
    assert parse_methods("todre:keep=1e+0")[0].keep == 1.0


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("", SpecError, "no method name"),
        ("+tome", SpecError, "no method name"),
        ("tome+", SpecError, "no method name"),
        ("tome:r", SpecError, "no setting; write key=value"),
        ("tome:=3", SpecError, "no setting"),
        ("tome::r=3", SpecError, "no setting"),
        ("tome:r=", SpecError, "no value"),
        ("tome:r=3:r=4", SpecError, "given twice"),
        ("tome:r=3,4", SpecError, "no value"),
        ("tome:r=[3;4", SpecError, "opened but not closed"),
        ("tome:r=3]", SpecError, "closed but not opened"),
        ("tome:r=(3;4]", SpecError, "different brackets"),
        ("tome:r=3 4", SpecError, "no value"),
        ("tome:r=nan", ParameterError, "r='nan' must be an integer"),
        ("pitome:alpha=1e999", ParameterError, "alpha=inf must be"),
        ("todre:keep=true", ParameterError, "keep=True is not possible"),
        ("todre:keep=0", ParameterError, "keep=0 is not possible"),
        ("tome:r=-1", ParameterError, "r=-1 must be"),
        ("tome:q=3", ParameterError, "tome has no parameter 'q'"),
        ("nope", UnknownMethod, "no method 'nope'"),
        ("tome+nope:r=3", UnknownMethod, "no method 'nope'"),
    ],
)
def test_bad_specs_are_one_clear_line(spec, error, says):
    with pytest.raises(error) as refusal:
        parse_methods(spec)
    assert says in str(refusal.value)
    assert isinstance(refusal.value, VlmtokError) and "\n" not in str(refusal.value)


@given(st.text(string.printable + "٣é", max_size=30))
def test_any_text_is_read_or_refused(spec):
    try:
        made = parse_methods(spec)
    except VlmtokError:
        return
    assert exactly([m.settings() for m in parse_methods("+".join(map(str, made)))], [m.settings() for m in made])


# ---------------------------------------------------------------------- swept values
@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("todre", ["todre"]),
        ("todre:keep=0.1,0.25,0.5", ["todre:keep=0.1", "todre:keep=0.25", "todre:keep=0.5"]),
        ("fastv:K=2,3:keep=0.5,0.25", [f"fastv:K={k}:keep={s}" for k in (2, 3) for s in (0.5, 0.25)]),
        (
            "tome:r=4,8+fastv:keep=0.5,0.25",
            [f"tome:r={r}+fastv:keep={s}" for r in (4, 8) for s in (0.5, 0.25)],
        ),
        ("pyramiddrop:layers=(2;4;6),none", ["pyramiddrop:layers=(2;4;6)", "pyramiddrop:layers=none"]),
        ("todre:rule=sum, max", ["todre:rule=sum", "todre:rule=max"]),
    ],
)
def test_swept_values_spread_out(spec, found):
    assert spec_strings.expand(spec) == found


def test_a_sweep_of_counts_beside_shares_is_refused():
    for spec in ("random:keep=1,1.0", "random:keep=0.5,1", "fastv:K=2:keep=14,0.5"):
        with pytest.raises(ParameterError, match=r"sweeps counts \(1\) beside shares \(1\.0\)"):
            spec_strings.expand(spec)
    assert spec_strings.expand("random:keep=1.0,0.5") == ["random:keep=1.0", "random:keep=0.5"]
    assert spec_strings.expand("random:keep=1,14") == ["random:keep=1", "random:keep=14"]
    assert spec_strings.expand("todre:tau=none,0.1") == ["todre:tau=none", "todre:tau=0.1"]


@pytest.mark.parametrize("spec", ["todre:keep=0.1,", "todre:keep=,0.1", "todre:keep=0.1,,0.5"])
def test_an_alternative_that_is_missing_is_refused(spec):
    with pytest.raises(SpecError, match="has an empty alternative"):
        spec_strings.expand(spec)


def test_a_bracket_that_does_not_close_is_refused():
    with pytest.raises(SpecError, match="not closed"):
        spec_strings.expand("pyramiddrop:layers=(2;4,none")
