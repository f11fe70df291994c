"""`docs/matrix.md` and the families of `tests/matrix.json` are what is found; ``tools/matrix.py`` writes both."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from support.places import ROOT

import vlmtok

AGAIN = "other pairs, or other reasons: run python tools/matrix.py, and look at the difference"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("matrix_tool", ROOT / "tools" / "matrix.py")
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def found():
    return vlmtok.matrix()


def test_the_page_is_what_is_found(tool, found):
    assert tool.PAGE.read_text("utf-8") == tool.page(found), AGAIN


def test_the_file_is_what_is_found(tool, found):
    assert tool.FILE.read_text("utf-8") == tool.file(found), AGAIN


def test_a_pair_that_comes_or_goes_is_seen(tool, found):
    fewer = vlmtok.Matrix(found.pairs[1:])
    assert tool.page(fewer) != tool.page(found) and tool.file(fewer) != tool.file(found)
    text = tool.tables(found)
    assert all(f"[{name}](methods/{name}.md)" in text for name in vlmtok.list_methods())
    assert f"{len(found.attaching)} of {len(found)} pairs attach" in text
