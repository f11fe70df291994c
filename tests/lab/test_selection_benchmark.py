"""The benchmark of selections: its loops follow the methods' rules, and the script runs."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch
from support.places import ROOT

from vlmtok.core.spec import parse_methods
from vlmtok.pruners.cdpruner import dpp_map

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def selection_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import selection_cpu

    monkeypatch.setattr(selection_cpu, "WIDTH", 64)
    return selection_cpu


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_chooses_what_its_method_does(selection_cpu, batch):
    """Otherwise a method would be measured against another rule."""
    torch.manual_seed(batch)
    drawn = selection_cpu.Drawn(batch, 96)
    loops = selection_cpu.own_loops(drawn, 12)
    assert set(loops) == {"cdpruner", "divprune", "mmtok", "scope", "todre", "vispruner"}
    for name, loop in loops.items():
        (method,) = parse_methods(f"{name}:keep=12")
        decide, left = selection_cpu.choice(method, drawn)
        found = decide().keep
        if name == "cdpruner":  # the method makes its relevance of the text
            found = dpp_map(drawn.x, 12, drawn.score / drawn.score.amax(1, keepdim=True))
        assert left == 12 and torch.equal(found.sort(1).values, loop().sort(1).values), name


def test_it_runs_and_says_on_what(tmp_path):
    out = tmp_path / "selection.csv"
    words = ["--sizes", "64:16", "--batches", "1", "2", "--rounds", "1", "--threads", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, "selection_cpu.py", *words], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    methods = [row["method"] for row in rows if row["batch"] == "1"]
    assert len(rows) == 2 * len(methods) and methods[0] == "k-center loop" and len(set(methods)) == len(methods) > 15
    for row in rows:
        assert float(row["median_ms"]) >= float(row["least_ms"]) > 0 and float(row["of_saving"]) > 0
        assert row["processor"] and row["versions"] and "GFLOP/s" in row["rate of the modelled prefill"]
    assert "| `scope` |" in out.with_suffix(".md").read_text()
