"""The citation names this version, and its fields are those of the format."""

import yaml
from support.places import ROOT

import vlmtok

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_it_cites_this_version():
    assert CITATION["version"] == vlmtok.__version__


def test_it_agrees_with_the_project():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'license = "{CITATION["license"]}"' in project
    assert f'authors = [{{ name = "{CITATION["authors"][0]["name"]}" }}]' in project


def test_it_has_the_fields_that_the_format_asks_for():
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    # strings, all of them: a version such as 1.10 must not be read as a number
    assert all(isinstance(CITATION[name], str) for name in ("cff-version", "message", "title", "version", "license"))


def test_the_policy_names_this_series():
    policy = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    series = ".".join(vlmtok.__version__.split(".")[:2])
    assert f"| {series} | yes |" in policy and "@" not in policy
