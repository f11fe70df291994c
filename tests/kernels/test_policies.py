"""Files of dispatch thresholds: read as they are written, refused where they are something else, own ones first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from vlmtok.errors import ParameterError
from vlmtok.kernels import table
from vlmtok.kernels.policy import NEVER, Policy, all_policies, read_policies, write_policies

OWN = Policy("energy", 8, 1 << 20, "measured", "GPU X", "torch 2, triton 3", "kernels_x.json")


def test_what_is_written_is_read(tmp_path):
    rows = (OWN, Policy("match_max", NEVER, 1 << 30, "measured", "GPU X"))
    write_policies(tmp_path / "x.json", rows)
    assert read_policies(tmp_path / "x.json") == rows
    assert len((tmp_path / "x.json").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize(
    "text, said",
    [
        ("nothing", "cannot read"),
        ("{}", "holds no dispatch rows"),
        ("[1]", "holds no dispatch rows"),
        ('[{"op": "energy"}]', "holds no dispatch rows"),
        (
            json.dumps([{"op": "e", "min_batch": 1, "pair_bytes": 1, "basis": "modelled", "more": 1}]),
            "holds no dispatch",
        ),
        (json.dumps([{"op": "e", "min_batch": "1", "pair_bytes": 1, "basis": "modelled"}]), "min_batch='1'"),
        (json.dumps([{"op": "e", "min_batch": True, "pair_bytes": 1, "basis": "modelled"}]), "min_batch=True"),
        (json.dumps([{"op": "e", "min_batch": 1, "pair_bytes": -1, "basis": "modelled"}]), "pair_bytes=-1"),
        (json.dumps([{"op": "e", "min_batch": 1, "pair_bytes": 1, "basis": "measured"}]), "that it names"),
        (json.dumps([{"op": "e", "min_batch": 1, "pair_bytes": 1, "basis": "guessed", "device": "x"}]), "guessed"),
    ],
)
def test_other_files_are_refused(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ParameterError, match=said):
        read_policies(path)
    with pytest.raises(ParameterError, match="cannot read"):
        read_policies(tmp_path / "missing.json")


def test_own_rows_come_before_those_that_ship(tmp_path, monkeypatch):
    shipped = all_policies()
    device = next(row.device for row in shipped if row.device)
    own = Policy("energy", 64, 1 << 20, "measured", device)
    write_policies(tmp_path / "x.json", (OWN, own))
    monkeypatch.setenv("VLMTOK_POLICIES", str(tmp_path / "x.json"))
    monkeypatch.setattr(table, "POLICIES", all_policies())
    assert (OWN, own, *shipped) == table.POLICIES
    assert table.policy("energy", device) == own and table.policy("match_max", device) in shipped
    monkeypatch.setattr(table, "_facts", {0: ("GPU X", True)})
    assert not table.prefers_triton("energy", 7, 0, torch.device("cuda", 0))
    assert table.prefers_triton("energy", 8, 0, torch.device("cuda", 0))


def test_a_bad_file_of_ones_own_is_said_when_kernels_are_imported(tmp_path):
    """Not at the first call on a GPU, hours later."""
    done = subprocess.run(
        [sys.executable, "-c", "import vlmtok.kernels"],
        env={**os.environ, "VLMTOK_POLICIES": str(tmp_path / "none.json")},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "cannot read dispatch rows" in done.stderr
