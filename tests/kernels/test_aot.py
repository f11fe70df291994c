"""Every kernel compiles for GPUs that are not here, without spills and within its budget.

Compiling happens in a process without TRITON_INTERPRET. `VLMTOK_AOT=every` compiles every row of the tile table, for
gfx942 too; without it, one of every kernel and those that come closest to a limit. Budgets are what
`python tests/kernels/aot.py sm_80 sm_90 --every` printed for the version of triton they name; with another version only
the limits hold, and a compiler that keeps less in registers may spill a little (triton 3.6: 8 bytes in a match, 464 in
the largest greedy choice).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
BUDGETS = json.loads((FOLDER / "aot_budgets.json").read_text())
EVERY = os.environ.get("VLMTOK_AOT") == "every"
SHARED = 48 * 1024
LARGER = {"received_attention 32-bit <= 256, 0 programs, bias": 51_200}
"""Cases that may use more shared memory than every GPU grants unasked."""


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "aot.py"), *arguments, *(["--every"] if EVERY else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]  # a missing compiler or disassembler fails, it does not skip
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="triton and its tools exist for Linux")
def test_budgets():
    from aot_cases import TIGHT, cases

    assert set(TIGHT) <= set(cases())
    found = run("sm_80", "sm_90", *(["gfx942"] if EVERY else []))
    version = found.pop("triton")
    assert {name.split(":")[0] for name in found} >= set(TIGHT)
    for name, used in found.items():
        assert used["spills"] <= (0 if version == BUDGETS["triton"] else 512), f"{name}: {used}"
        if name.endswith("gfx942"):  # it compiles; nothing else is promised
            continue
        assert used["registers"] <= 255
        assert used["shared"] <= LARGER.get(name.split(":")[0], SHARED), f"{name}: {used}"
        if version == BUDGETS["triton"]:
            budget = BUDGETS[name]
            assert used["registers"] <= budget["registers"], f"{name}: {used}, budget {budget}"
            assert used["shared"] <= budget["shared"], f"{name}: {used}, budget {budget}"
            assert used["loop"] <= 1.1 * budget["loop"], f"{name}: {used}, budget {budget}"


def test_every_tile_has_a_case_that_uses_it():
    """Without compiling: a launcher picks, for its case, the constants of that row."""
    from aot_cases import cases
    from count_ops import capture

    from vlmtok.kernels.table import TILES

    seen = set()
    for name, (row, call) in cases().items():
        if row is None:
            continue
        seen.add(row)
        launch = [one for one in capture(call) if one.kernel.__name__ != "_shared_kernel"][-1]  # that has no tile
        assert launch.warps == row.warps, name
        if {"BM", "BN"} <= launch.constants.keys():
            assert (launch.constants["BM"], launch.constants["BN"]) == (row.m, row.n), name
        else:
            assert launch.constants.get("BN", launch.constants.get("BD")) == row.n, name
    # Sorting networks of thousands take a minute to compile; they are smaller ones, unrolled further.
    assert {row for row in TILES if row not in seen} == {row for row in TILES if row.op == "order" and row.n > 1024}
