"""Settings of methods, the registry and its plug-ins, spec strings, and what `Reduction` and `TokenView` refuse."""

from __future__ import annotations

import importlib.metadata
import math
import string
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.checks import assert_equal, assert_same
from torch import nn

import vlmtok
from vlmtok import Counts, Layout, Method, Reduction, Site, StageLayout, TokenView, keep_count, parse_methods
from vlmtok.core import registry as registry_module
from vlmtok.core import settings, spec
from vlmtok.errors import (
    MissingSignal,
    ParameterError,
    SiteError,
    SpecError,
    UnknownMethod,
    UnsupportedModel,
    VlmtokError,
    VlmtokWarning,
)

METHODS = vlmtok.list_methods()


@pytest.fixture
def registry(monkeypatch):
    """Methods that a test registers are gone behind it."""
    monkeypatch.setattr(registry_module, "_METHODS", dict(registry_module._METHODS))
    return registry_module._METHODS


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


# ---------------------------------------------------------------------- registry
def test_wildcards():
    assert vlmtok.list_methods() == METHODS == sorted(METHODS)
    assert vlmtok.list_methods("*prune*") == [name for name in METHODS if "prune" in name]
    assert vlmtok.list_methods("to[dm]*") == ["todre", "tome"]
    assert vlmtok.list_methods("nothing*") == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    cls = vlmtok.method_class(name)
    assert getattr(vlmtok, cls.__name__) is cls
    assert cls.spec_name() == name == str(vlmtok.create_method(name))
    assert cls.__doc__ and "Args:" in cls.__doc__
    assert cls.paper and cls.parity
    assert cls.scope in ("picture", "part", "sample")
    assert all(f"{key}:" in cls.__doc__ for key in vlmtok.create_method(name).settings()), (
        "a parameter is not explained"
    )


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownMethod, match=r"no method 'pitom'; did you mean 'pitome' .*Known: .*todre"):
        vlmtok.create_method("pitom")
    with pytest.raises(ParameterError, match=r"pitome has no parameter 'ration'; did you mean 'ratio'\? Parameters: "):
        vlmtok.create_method("pitome", ration=0.9)
    with pytest.raises(ParameterError, match="tome has no presets"):
        vlmtok.create_method("tome", preset="paper")
    with pytest.raises(AttributeError, match="module 'vlmtok' has no attribute 'PiToMee'; did you mean 'PiToMe'"):
        vlmtok.PiToMee  # noqa: B018
    assert vlmtok.create_method("todre", keep=0.1).keep == 0.1


def own(name, module=__name__, qualname="Own"):
    made = dataclass(eq=False)(type("Own", (Method,), {"name": name, "__module__": module, "__qualname__": qualname}))
    return made


def test_registering(registry):
    first = vlmtok.register_method(own("own_one"))
    assert vlmtok.create_method("own_one").__class__ is first
    again = vlmtok.register_method(own("own_one"))  # a notebook cell that ran twice
    assert vlmtok.method_class("own_one") is again
    with pytest.raises(ParameterError, match="already taken by vlmtok"):
        vlmtok.register_method(own("tome"))
    for name in ("Own", "own-one", "1own", ""):
        with pytest.raises(ParameterError, match="must be lower-case letters, digits and _"):
            vlmtok.register_method(own(name, qualname=f"Own{name}") if name else own(" "))


class Entry:
    """What importlib.metadata finds in an installed plug-in."""

    def __init__(self, name, load):
        self.name, self.load = name, load


def installed(monkeypatch, **groups):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: groups.get(group.partition(".")[2], []))


def fails():
    raise ImportError("no module named 'their_package'")


def test_plug_ins_bring_methods(registry, monkeypatch):
    installed(
        monkeypatch,
        methods=[
            Entry("broken", fails),
            Entry("theirs", lambda: vlmtok.register_method(own("theirs", "their_package"))),
        ],
    )
    monkeypatch.setattr(registry_module, "_loaded", False)
    with pytest.warns(VlmtokWarning, match=r"method plug-in 'broken' does not load: ImportError\(\"no module named"):
        names = vlmtok.list_methods()
    assert set(METHODS) | {"theirs"} == set(names)
    assert str(parse_methods("theirs")[0]) == "theirs"


def test_plug_ins_bring_adapters(monkeypatch):
    from vlmtok.adapters import adapter_for
    from vlmtok.adapters.base import Adapter

    class Mine(nn.Module):
        pass

    class Derived(Mine):
        pass

    class Theirs(Adapter):
        name = "theirs"
        targets = ((Mine.__module__, Mine.__qualname__),)

        def layout(self):
            return Layout("theirs", {"vision": StageLayout(2, 4, 1, 1)})

    installed(monkeypatch, adapters=[Entry("broken", fails), Entry("theirs", lambda: Theirs)])
    with pytest.warns(VlmtokWarning, match="adapter plug-in 'broken' does not load"):
        assert isinstance(adapter_for(Derived()), Theirs)
    with pytest.warns(VlmtokWarning, match="broken"), pytest.raises(SiteError, match="theirs"):
        vlmtok.compress(Mine(), "fastv")
    with pytest.warns(VlmtokWarning, match="broken"), pytest.raises(UnsupportedModel, match="no adapter carries"):
        adapter_for(nn.Linear(1, 1))


def test_a_plug_in_does_not_shadow_what_is_built_in(monkeypatch):
    from vlmtok.adapters import adapter_for
    from vlmtok.adapters.base import Adapter

    class Theirs(Adapter):
        targets = (("timm.models.vision_transformer", "VisionTransformer"),)

    installed(monkeypatch, adapters=[Entry("theirs", lambda: Theirs)])
    assert adapter_for(models.shared("timm ViT")).name == "timm-vit"


# ---------------------------------------------------------------------- spec strings
numbers = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(string.ascii_letters + string.digits + "_./@-", max_size=8).map("w".__add__)
words = words.filter(lambda word: word.lower() not in ("true", "false", "none"))
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@dataclass(eq=False)
class Anything(Method):
    """Takes whatever a spec string can say."""

    a: object = 1
    b: object = None


def exactly(one, other):
    """Equal in type too, through lists and tuples."""
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(exactly, one, other))
    return type(one) is type(other) and one == other


@given(a=values, b=values)
def test_any_value_goes_round(a, b):
    known = registry_module._METHODS
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
        assert type(spec._parse_value(text, "")).__name__ == kind, text
    assert spec._parse_value("(1;)", "") == (1,)
    assert spec._parse_value("()", "") == ()
    assert spec._parse_value("[(1;a);[none;2.5]]", "") == [(1, "a"), [None, 2.5]]
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


# ---------------------------------------------------------------------- sites and layouts
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stage": "tower"}, "stage 'tower' does not exist; stages: vision, features"),
        ({"stage": "vision"}, "needs a layer"),
        ({"stage": "projected", "layer": 0}, "has no layer"),
        ({"stage": "vision", "layer": 0, "point": "middle"}, "point 'middle' does not exist"),
        ({"stage": "projected", "positions": "drop"}, "positions 'drop'"),
        ({"stage": "projected", "scope": "batch"}, "scope 'batch'"),
    ],
)
def test_sites_that_cannot_be(given, says):
    with pytest.raises(SiteError, match=says):
        Site(**given)


def test_layers_are_resolved_by_the_layout():
    layout = Layout("host", {"vision": StageLayout(12, 8, 2, 10)}, {"decoder": "it has none"})
    assert layout.layers("vision") == [*range(11)]
    assert layout.layers("vision", -3) == [9]
    assert layout.layers("vision", (5, 0, 5, 11)) == [0, 5], "ascending, once each, none behind the last that is read"
    for wrong in (12, -13, True, 1.5, "x"):
        with pytest.raises(SiteError, match=r"ToMe: layer .* does not exist; vision of host has layers 0 to 11"):
            layout.layers("vision", wrong if isinstance(wrong, int) else [wrong], "ToMe")
    with pytest.raises(
        SiteError, match=r"stage 'decoder', which host does not offer \(it has none\); it offers: vision"
    ):
        layout.stage("decoder")


# ---------------------------------------------------------------------- reductions
KEEP, SRC = torch.tensor([[0, 2, 3]]), torch.tensor([[1, 4]])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": KEEP[0]}, r"keep must be int64 \[B, K\]"),
        ({"keep": KEEP.int()}, r"keep must be int64 \[B, K\], got torch.int32"),
        ({"keep": KEEP, "src": SRC}, "src and dst together"),
        ({"keep": KEEP, "src": SRC, "dst": SRC[:, :1]}, "src and dst must be int64"),
        ({"keep": KEEP, "src": SRC.float(), "dst": SRC}, "src and dst must be int64"),
        ({"keep": KEEP, "src": SRC.expand(2, -1), "dst": SRC.expand(2, -1)}, "with B = 1"),
        (
            {"keep": KEEP, "src": SRC, "dst": SRC, "keep_weight": torch.ones(1, 3)},
            "keep_weight and src_weight together",
        ),
        ({"keep": KEEP, "keep_weight": torch.ones(1, 3), "src_weight": torch.ones(1, 0)}, "need src and dst"),
        (
            {"keep": KEEP, "src": SRC, "dst": SRC, "keep_weight": torch.ones(1, 2), "src_weight": torch.ones(1, 2)},
            "shapes of keep",
        ),
        ({"keep": KEEP, "valid": torch.ones(1, 3)}, "valid must be bool"),
        ({"keep": KEEP, "valid": torch.ones(1, 2, dtype=torch.bool)}, "valid must be bool"),
    ],
)
def test_reductions_that_cannot_be(given, says):
    with pytest.raises(ParameterError, match=says):
        Reduction(**given)


def test_a_reduction_by_hand():
    """Slots are 0+1 (sizes 1 and 3), 2, 3; token 4 joins nothing."""
    x, size = torch.tensor([[[0.0], [4.0], [2.0], [7.0], [9.0]]]), torch.tensor([[1.0, 3.0, 1.0, 2.0, 5.0]])
    merged = Reduction(KEEP, SRC, torch.tensor([[0, -1]]))
    slots, sizes = merged.apply(x, size)
    assert (slots[0, :, 0].tolist(), sizes[0].tolist()) == ([3.0, 2.0, 7.0], [4.0, 1.0, 2.0])
    assert merged.assignment(5).tolist() == [[0, 0, 1, 2, -1]]
    assert merged.unmerge(slots, 5)[0, :, 0].tolist() == [3.0, 3.0, 2.0, 7.0, 0.0]
    plain, counts = Reduction.mean(KEEP, SRC, torch.tensor([[0, -1]])).apply(x, size)
    assert (plain[0, :, 0].tolist(), counts[0].tolist()) == ([2.0, 2.0, 7.0], [4.0, 1.0, 2.0])
    weighted = Reduction(
        KEEP, SRC, torch.tensor([[0, 0]]), torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[2.0, 1.0]])
    )
    assert weighted.apply(x, size)[0][0, :, 0].tolist() == [17.0, -2.0, 3.5]
    pruned, left = Reduction(KEEP).apply(x, size)
    assert (pruned[0, :, 0].tolist(), left[0].tolist()) == ([0.0, 2.0, 7.0], [1.0, 1.0, 2.0])
    assert_same(Reduction(KEEP).apply(x)[1], torch.ones(1, 3))


def test_the_first_entry_that_names_a_token_owns_it():
    """With weights a token may occur several times; a kept one of an invalid slot may join another one."""
    keep, src, dst = torch.tensor([[0, 2]]), torch.tensor([[1, 3, 1, 3]]), torch.tensor([[-1, 1, 0, 0]])
    assert Reduction(keep, src, dst, torch.ones(1, 2), torch.ones(1, 4)).assignment(5).tolist() == [[0, 0, 1, 1, -1]]
    ragged = Reduction(keep, torch.tensor([[2]]), torch.tensor([[0]]), valid=torch.tensor([[True, False]]))
    assert ragged.assignment(3).tolist() == [[0, -1, 0]]
    assert ragged.apply(torch.ones(1, 3, 1), torch.tensor([[1.0, 2.0, 4.0]]))[1].tolist() == [[5.0, 0.0]]


def test_features_may_keep_protected_tokens():
    x, cls = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[[9.0]]])
    slots, sizes = Reduction(torch.tensor([[3, 1]])).apply(x, None, cls)
    assert (slots[0, :, 0].tolist(), sizes[0].tolist()) == ([9.0, 3.0], [0.0, 1.0])


@given(seed=st.integers(0, 1000), weighted=st.tuples(st.booleans(), st.booleans()))
def test_then_is_one_after_the_other(seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    x, size = torch.randn(2, 12, 3, generator=generator), torch.randint(1, 5, (2, 12), generator=generator).float()

    def drawn(n, mean):
        order = torch.stack([torch.randperm(n, generator=generator) for _ in range(2)])
        k = n // 2
        keep, src = order[:, :k], order[:, k : n - 1]  # one token is dropped
        dst = torch.randint(-1, k, src.shape, generator=generator)
        return (Reduction.mean if mean else Reduction)(keep, src, dst)

    one, other = drawn(12, weighted[0]), drawn(6, weighted[1])
    first, sizes = one.apply(x, size)
    wanted, left = other.apply(first, sizes)
    joined = one.then(other, size)
    found, found_size = joined.apply(x, size)
    assert_equal(found, wanted)
    assert_equal(found_size, left, 0)
    owner = one.assignment(12)
    chained = torch.where(owner < 0, -1, other.assignment(6).gather(1, owner.clamp(min=0)))
    assert torch.equal(joined.assignment(12), chained)


def test_empty_entries_may_name_no_token():
    x = torch.randn(1, 6, 3)
    one = Reduction(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-1, 4, 5]]), torch.tensor([[-1, 0, 2]]))
    other = Reduction.mean(torch.tensor([[0, 2]]), torch.tensor([[1, -1]]), torch.tensor([[0, -1]]))
    for first, second in ((one, other), (one, Reduction(other.keep, other.src, other.dst))):
        wanted, sizes = second.apply(*first.apply(x))
        found, found_sizes = first.then(second, torch.ones(1, 6)).apply(x)
        assert_equal(found, wanted)
        assert_equal(found_sizes, sizes, 0)


def test_unmerge_gives_zeros_where_tokens_were_dropped():
    spread = Reduction(torch.tensor([[0, 1]])).unmerge(torch.tensor([[[float("nan")], [1.0]]]), 3)
    assert spread[0, 1:, 0].tolist() == [1.0, 0.0] and spread[0, 0].isnan()
    assert Reduction(torch.zeros(1, 0, dtype=torch.int64)).unmerge(torch.zeros(1, 0, 2), 3).tolist() == [
        [[0.0] * 2] * 3
    ]


def test_protected_tokens_and_a_prefix_do_not_go_together():
    with pytest.raises(ParameterError, match="not both"):
        Reduction(torch.tensor([[0, 3]])).apply(torch.zeros(1, 4, 2), protected=torch.zeros(1, 1, 2), prefix=1)


# ---------------------------------------------------------------------- views
def test_a_view_in_one_line():
    x = torch.randn(2, 6, 4)
    view = TokenView(x)
    assert (view.site, view.layer, view.num_prefix, view.entered, view.size) == (Site("vision", 0), 0, 0, 6, None)
    assert view.counts == Counts(Site("vision", 0), 6, 6)
    assert view.part.tolist() == [[0] * 6] * 2
    assert TokenView(x, entered=9).counts.entered == 9, "a view behind a cut"
    assert TokenView(x, num_prefix=1).columns.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    assert vlmtok.ToMe(r=2).reduce(TokenView(x, size=torch.ones(2, 6), num_prefix=1, signals={"keys": x})).slots == 4
    pitome = vlmtok.PiToMe(ratio=0.5, margin=0.75)
    reduced = [pitome.reduce(TokenView(x, Site("vision", i, "mid"), depth=12, signals={"keys": x})) for i in (0, 11)]
    assert torch.equal(reduced[0].keep, reduced[1].keep), "a plain number for a schedule holds for every layer"
    assert vlmtok.ToDRE(keep=2, tau=None, pivot="center").reduce(TokenView(x, Site("projected"))).slots == 2
    assert vlmtok.Random(keep=0.5).reduce(TokenView(x)).slots == 3


def test_views_that_cannot_be():
    with pytest.raises(ParameterError, match=r"tokens must be \[B, N, C\], got \[6, 4\]"):
        TokenView(torch.randn(6, 4))
    with pytest.raises(ParameterError, match=r"size must be \[B, N\] = \[2, 6\], got \[2, 5\]"):
        TokenView(torch.randn(2, 6, 4), size=torch.ones(2, 5))


def test_signals_are_made_when_first_asked():
    asked = []

    def keys():
        asked.append(1)
        return torch.ones(1, 3, 2)

    view = TokenView(torch.randn(1, 3, 4), signals={"keys": keys, "text": None})
    assert not asked
    assert view.signal("keys") is view.signal("keys")
    assert asked == [1]
    assert view.has("text") and view.maybe("text") is None
    with pytest.raises(
        MissingSignal, match=r"signal 'text' does not exist at vision layer 0 end; this view has: keys, text"
    ):
        view.signal("text")
    with pytest.raises(MissingSignal, match="signal 'cls_attention'"):
        view.signal("cls_attention")


# ---------------------------------------------------------------------- budgets move one parameter
def test_a_method_without_a_parameter_for_it_takes_no_budget():
    with pytest.raises(ParameterError, match="a budget cannot be set"):
        Anything().at_level(0.5, Layout("host"), 16)
    with pytest.raises(ParameterError, match="keep=None leaves the number to the method"):
        vlmtok.ToDRE(keep=None).at_level(0.5, Layout("host"), 16)
    assert replace(vlmtok.Random(), keep=3).at_level(0.25, Layout("host"), 16).keep == 4
