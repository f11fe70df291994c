"""What methods cost for one picture: what ships is what the benchmarks have, and the words follow the figures."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.places import ROOT

from vlmtok.core.registry import list_methods
from vlmtok.lab import batch_one
from vlmtok.lab.batch_one import Cost, costs


def test_the_table_is_what_the_results_give(tmp_path):
    done = subprocess.run([sys.executable, "tools/batch_one.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rows_are_of_known_methods_and_nothing_is_on_record_of_others():
    found = {name: costs(name) for name in list_methods()}
    text = batch_one.FILE.read_text("utf-8")
    assert sum(map(len, found.values())) == len(text.splitlines()) - 1
    assert costs("tome") and not costs("kv_norm")
    for name, rows in found.items():
        assert [row.times for row in rows] == sorted((row.times for row in rows), reverse=True)
        for row in rows:
            assert row.method == name and row.times > 0 and row.tokens > 1 and row.device and row.versions
            assert (row.selection is None) == (row.basis == "measured")


@pytest.mark.parametrize(
    "times, selection, said",
    [
        (1.2, None, "costs more than it saves"),
        (1.0, None, "saves 0%"),
        (0.25, None, "saves 75%"),
        (0.25, 0.0012, "saves 75%; the choice is 0.12% of that"),
    ],
)
def test_verdicts(times, selection, said):
    cost = Cost("tome", "tome:r=8", "a tower", 576, times, selection, "measured", "a card", "float32", "torch 3")
    assert cost.verdict == said and cost.to_dict()["costs_more_than_it_saves"] == (times > 1)
