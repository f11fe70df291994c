"""What can be turned at a method: ranges come from its own checks and from the model, for every method."""

import dataclasses
import warnings
from dataclasses import dataclass

import pytest
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.core.hooks import hooks_of
from vlmtok.core.method import Method
from vlmtok.errors import ParameterError, VlmtokError, VlmtokWarning
from vlmtok.forecast.presets import preset
from vlmtok.lab import knobs
from vlmtok.lab.knobs import Knob, admitted


def layout(speaker):
    return adapter_for(speaker.model).layout()


def by_key(method, where):
    found = knobs.knobs(vlmtok.create_method(method) if isinstance(method, str) else method, where)
    return {knob.key: knob for knob in found}


def test_only_methods_that_the_model_takes_are_offered(speaker):
    offered = admitted(layout(speaker))
    for name in vlmtok.list_methods():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VlmtokWarning)  # nothing runs
                vlmtok.compress(speaker.model, name).remove()
            taken = True
        except VlmtokError:
            taken = False
        assert (name in offered) == taken, name
    assert not list(hooks_of(speaker.model))
    lone = admitted(preset("vit-b-16").layout)
    assert "tome" in lone and "fastv" not in lone and "fastv" in offered


@pytest.mark.parametrize("name", vlmtok.list_methods())
@pytest.mark.parametrize("shape", ["llava-1.5-7b", "clip-vit-b-16"])
def test_each_setting_has_a_knob_whose_values_the_method_takes(name, shape):
    where = preset(shape).layout
    if name not in admitted(where):
        return
    method = vlmtok.create_method(name)
    found = knobs.knobs(method, where)
    assert {knob.name for knob in found} == set(method.settings())
    assert len({knob.key for knob in found}) == len(found)
    assert [knob.name for knob in found if knob.strength] == [found[0].name] * sum(knob.strength for knob in found)
    for knob in found:
        assert knob.what, f"{name}.{knob.key} has no words"
        if knob.kind in ("share", "count"):
            assert list(knob.values) == sorted(knob.values) and len(knob.values) > 1
            assert knob.value is None or knob.values[0] <= knob.value <= knob.values[-1]
        for value in (knob.values[0], knob.values[-1]) if knob.values and knob.place is None else ():
            dataclasses.replace(method, **{knob.name: value}).sites(where)
        if knob.optional:
            dataclasses.replace(method, **{knob.name: None}).sites(where)


def test_ranges_are_those_of_the_checks_and_of_the_depth(speaker):
    found = by_key("fastv", layout(speaker))
    assert found["keep"] == Knob("keep", "share", 0.5, found["keep"].values, strength=True, what=found["keep"].what)
    assert found["keep"].values[0] == 0.01 and found["keep"].values[-1] == 1.0
    assert (found["K"].kind, found["K"].values) == ("count", tuple(range(1, 16)))  # of 16 layers, one must be left
    assert found["positions"].values == ("keep", "renumber")
    deep = by_key("fastv", preset("llava-1.5-7b").layout)
    assert deep["K"].values == tuple(range(1, 32))
    todre = by_key("todre", layout(speaker))
    assert todre["check_layer"].optional and todre["check_layer"].values == tuple(
        range(15)
    )  # the last is cut by nobody
    assert todre["check_layer"].value is None and todre["tau"].optional and todre["keep"].optional
    assert by_key(vlmtok.ToDRE(keep=14), layout(speaker))["keep"].kind == "count"


def test_items_of_tuples_have_knobs_of_their_own(speaker):
    found = by_key("pyramiddrop", layout(speaker))
    assert [found[f"ratios[{i}]"].value for i in range(3)] == [0.5, 0.25, 0.125]
    assert all(found[f"ratios[{i}]"].strength for i in range(3))
    assert found["ratios[0]"].values[0] == 0.01 and found["ratios[2]"].values[-1] == 1.0
    assert found["layers"].kind == "typed" and found["layers"].value == "none"
    cuts = by_key(vlmtok.TransPrune(), preset("llava-1.5-7b").layout)
    assert [cuts[f"layers[{i}]"].value for i in range(3)] == [7, 9, 12]
    assert cuts["layers[0]"].values[-1] > 9  # when the others go along


def test_a_method_of_ones_own_needs_no_line_here(speaker):
    @dataclass(eq=False)
    class Mine(Method):
        """Of another package.

        Args:
            share: how much.
            mode: how.
        """

        share: "float | Unknown" = 0.5  # noqa: F821
        mode: str = "a"
        where: int = 3

        def __post_init__(self):
            if not 0.2 <= self.share <= 0.6:
                raise ValueError("share")
            if self.mode not in ("a", "b"):
                raise ParameterError("mode: a or b")

        def sites(self, layout):
            return [vlmtok.Site("decoder", self.where)]

    found = by_key(Mine(), layout(speaker))
    assert (found["share"].values[0], found["share"].values[-1]) == (0.2, 0.6) and found["share"].what == "how much."
    assert found["mode"].kind == "typed" and found["where"].values == tuple(range(15))
