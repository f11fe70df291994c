"""The registry of methods: names, wildcards, methods of the user's, and plug-ins."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import pytest
from support import models
from support.methods import METHODS
from torch import nn

import vlmtok
from vlmtok import Layout, Method, StageLayout, parse_methods
from vlmtok.core import registry as core_registry
from vlmtok.core.site import SCOPES
from vlmtok.errors import ParameterError, SiteError, UnknownMethod, UnsupportedModel, VlmtokWarning
from vlmtok.lab.catalogue import argument_docs


@pytest.fixture
def registry(monkeypatch):
    """Methods that a test registers are gone behind it."""
    monkeypatch.setattr(core_registry, "_METHODS", dict(core_registry._METHODS))
    return core_registry._METHODS


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
    assert cls.scope in SCOPES
    assert set(argument_docs(cls)) >= set(vlmtok.create_method(name).settings()), "a parameter is not explained"


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
    monkeypatch.setattr(core_registry, "_loaded", False)
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
