"""Notebooks open with what they show and how long it takes, can swap a checkpoint in, and hold clean outputs."""

import json
import re

import pytest
from support.places import ROOT

NOTEBOOKS = {path.name: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
LOCAL = re.compile(r"(?<![\w.])/(?:home|root|opt|tmp|work|usr|var|Users)/|[A-Z]:\\\\|Warning|Traceback")


def cells(name, kind):
    return [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def dirt(text):
    """Paths of a machine, warnings and errors."""
    return LOCAL.findall(text)


def test_six_notebooks_are_there():
    assert [name[:2] for name in NOTEBOOKS] == [f"0{i}" for i in range(1, 7)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_opens_with_what_it_shows_and_how_long_it_takes(name):
    first = NOTEBOOKS[name]["cells"][0]
    assert first["cell_type"] == "markdown" and source(first).startswith("# ")
    assert re.search(r"\b(seconds|minutes?)\b", source(first)) and "download" in source(first)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_one_cell_swaps_a_hub_checkpoint_in(name):
    set_here = [c for c in cells(name, "code") if re.search(r"^HUB = None  # .*\"[\w-]+/[\w.-]+\"", source(c), re.M)]
    assert len(set_here) == 1
    assert sum(source(cell).count("HUB") for cell in cells(name, "code")) > 1, "HUB is set and read by nothing"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_committed_in_the_order_of_the_cells_and_clean(name):
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in out.get("data", {}) for cell in code for out in cell["outputs"])
    for cell in code:
        for out in cell["outputs"]:
            assert out["output_type"] != "error" and out.get("name") != "stderr", source(cell)
            text = {kind: value for kind, value in out.get("data", {}).items() if kind.startswith("text/")}
            assert not dirt(json.dumps([out.get("text", ""), text])), source(cell)


@pytest.mark.parametrize("text", ["see /tmp/x/y.py", "/home/ada/model", "UserWarning: no", "Traceback (most recent"])
def test_dirt_is_found(text):
    assert dirt(text)
