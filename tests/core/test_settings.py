"""Settings of methods: wrong ones are refused by name, shares and counts, presets, budgets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.methods import METHODS, Anything

import vlmtok
from vlmtok import Layout, keep_count
from vlmtok.errors import (
    ParameterError,
)

# ---------------------------------------------------------------------- settings
NAN, INF = math.nan, math.inf
WRONG = {
    bool: ["yes", 1, 0, None],
    int: [True, NAN, INF, 1.5, "word", [], ()],
    float: [True, NAN, INF, "word", [], ()],
    str: ["no_such_word", 1.5, True, []],
    tuple: [True, NAN, "word", (), []],
    type(None): [True, NAN, "no_such_word"],
}
"""Values that are never right, by the type of a parameter's default."""


@pytest.mark.parametrize("name", METHODS)
def test_wrong_settings_are_refused_by_name(name):
    made = vlmtok.create_method(name)
    for key, default in made.settings().items():
        for value in WRONG[type(default)]:
            with pytest.raises(ParameterError) as refusal:
                vlmtok.create_method(name, **{key: value})
            message = str(refusal.value)
            assert message.startswith(type(made).__name__), message
            assert key in message, f"{message} does not name {key}"


@pytest.mark.parametrize("name", [name for name in METHODS if "keep" in vlmtok.create_method(name).settings()])
@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, 1.0000001, True, False, NAN, INF, "0.5"])
def test_keep_is_a_share_or_a_count(name, keep):
    with pytest.raises(ParameterError, match=r"keep=.* a float in \(0, 1\] is a share .*, an int >= 1 a count"):
        vlmtok.create_method(name, keep=keep)


@pytest.mark.parametrize(
    ("cls", "settings", "says"),
    [
        (vlmtok.ToMe, {"r": -1}, "r=-1 must be an integer in [0, inf]"),
        (vlmtok.ToMe, {"r": [4, -1]}, "r=-1 must be"),
        (vlmtok.ToMe, {"r": 2.5}, "r=2.5 must be an integer"),
        (vlmtok.ToMe, {"r": (4, 2.0)}, "inflection=2.0 must be"),
        (vlmtok.ToMe, {"r": (4,)}, "must be an int, a list of ints, or (r, inflection)"),
        (vlmtok.ToMe, {"r": [[4]]}, "r=[4] must be an integer"),
        (vlmtok.PiToMe, {"ratio": 0}, "ratio=0 is not possible"),
        (vlmtok.PiToMe, {"ratio": 1.5}, "ratio=1.5 must be a number in [0, 1]"),
        (vlmtok.PiToMe, {"ratio": [0.9, NAN]}, "ratio=nan must be"),
        (vlmtok.PiToMe, {"margin": (0.9,)}, "margin=(0.9,) must be a number or (a, b)"),
        (vlmtok.PiToMe, {"energy": "ELU"}, "energy='ELU' is not possible; one of 'elu', 'paper', 'gaussian'"),
        (vlmtok.ToDRE, {"keep": None, "tau": None}, "leave nothing to do"),
        (vlmtok.ToDRE, {"tau": -0.1}, "tau=-0.1 must be a number in [0, 1]"),
        (vlmtok.ToDRE, {"pivot": -1}, "pivot=-1 must be"),
    ],
)
def test_messages_say_what_was_asked_and_what_is_possible(cls, settings, says):
    with pytest.raises(ParameterError) as refusal:
        cls(**settings)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@given(keep=st.floats(1e-6, 1.0) | st.integers(1, 10_000), n=st.integers(0, 5_000))
def test_keep_count(keep, n):
    """Shares round half up, at least 1; counts are capped."""
    found = keep_count(keep, n)
    assert min(n, 1) <= found <= n
    if isinstance(keep, int):
        assert found == min(keep, n)
    elif n and found > 1:
        assert abs(found - keep * n) <= 0.5 + 1e-9
    assert (keep_count(0.5, 5), keep_count(0.3, 5), keep_count(1, 5), keep_count(1.0, 5)) == (3, 2, 1, 5)


def test_presets_reproduce_the_released_configurations():
    """pitome.md: margins, matchers and biases of each task."""
    made = {name: vlmtok.PiToMe.preset(name).settings() for name in ("paper", "aug", "deit", "mae", "clip", "llava")}
    paper, aug = made["paper"], made["aug"]
    assert (paper["margin"], paper["energy"], paper["metric"], paper["prop_attn"]) == ((0.9, 0.9), "elu", "keys", True)
    assert {key for key in paper if paper[key] != aug[key]} == {"prop_attn"}
    assert (made["deit"]["margin"], made["deit"]["protect"]) == ((0.75, 0.75), "second_half")
    assert made["mae"]["protect"] == "first_half"
    llava = made["llava"]
    assert (llava["point"], llava["metric"], llava["weighted"], llava["plain"]) == ("end", "hidden", False, 13)
    assert vlmtok.PiToMe.preset("deit", ratio=0.95).ratio == 0.95
    with pytest.raises(ParameterError, match="preset='none' is not possible; one of 'paper', 'aug'"):
        vlmtok.PiToMe.preset("none")


# ---------------------------------------------------------------------- budgets move one parameter
def test_a_method_without_a_parameter_for_it_takes_no_budget():
    with pytest.raises(ParameterError, match="a budget cannot be set"):
        Anything().at_level(0.5, Layout("host"), 16)
    with pytest.raises(ParameterError, match="keep=None leaves the number to the method"):
        vlmtok.ToDRE(keep=None).at_level(0.5, Layout("host"), 16)
    assert replace(vlmtok.Random(), keep=3).at_level(0.25, Layout("host"), 16).keep == 4
