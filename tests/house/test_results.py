"""Measured tables and figures are what the result files say, and what `recommend` reads is the same file."""

from __future__ import annotations

import importlib.util
import re

import pytest
from support.places import ROOT

_spec = importlib.util.spec_from_file_location("results_page", ROOT / "tools" / "results.py")
results = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(results)

TASKS = sorted(path.stem for path in results.EVAL.glob("*.csv"))


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_pages_are_as_the_results_have_them(page):
    text = page.read_text("utf-8")
    assert "<!-- results: " in text
    assert results.filled(text) == text, f"{page.name} has drifted: python tools/results.py"


def test_every_table_stands_somewhere():
    named = {
        name for page in results.PAGES for name in re.findall(r"<!-- results: ([\w ]+) -->", page.read_text("utf-8"))
    }
    assert named - {"end"} == set(results.TABLES)


@pytest.mark.parametrize("name", results.FIGURES)
def test_figures_are_drawn_from_the_results(name):
    task, *_ = results.FIGURES[name]
    assert results.drawn_from(ROOT / name) == results.source(task), f"{name} has drifted: python tools/results.py"


def test_a_changed_result_is_noticed():
    page = results.PAGES[0].read_text("utf-8")
    cell = re.search(r"\| `divprune` \| ([\d.]+) \|", page)[1]
    assert results.filled(page.replace(f"| `divprune` | {cell} |", "| `divprune` | 12.3 |")) == page


@pytest.mark.parametrize("task", TASKS)
def test_what_ships_is_what_was_measured(task):
    shipped = ROOT / "vlmtok" / "data" / "results" / f"{task}.csv"
    assert shipped.read_bytes() == (results.EVAL / f"{task}.csv").read_bytes()


def test_results_hold_every_method_and_separate_them():
    """Each registered method has rows or a reason; methods differ beyond their intervals on several kinds."""
    import vlmtok

    found = results.Results("scenes-vqa")
    assert set(vlmtok.list_methods()) <= {row["method"] for row in results.rows_of("scenes-vqa")}
    apart = []
    kinds = [kind for kind in found.kinds if kind != "all"]
    worst = best = 0
    for kind in kinds:
        rows = [row for row in found.rows if row["keep"] == 0.25 and row["kind"] == kind and row["low"] is not None]
        rows = [row for row in rows if row["asked"] != "downsample"]
        free = [row for row in rows if row["asked"] != "random"]
        if max(row["low"] for row in free) > min(row["high"] for row in free):
            apart.append(kind)
        (drawn,) = (row["quality"] for row in rows if row["asked"] == "random")
        worst += drawn < min(row["quality"] for row in free)
        best += drawn > max(row["quality"] for row in free)
    assert len(apart) >= 3 and worst < len(kinds) and best == 0
    for row in found.rows:
        assert bool(row["problem"]) == (row["quality"] is None)
