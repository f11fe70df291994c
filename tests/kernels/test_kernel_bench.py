"""The benchmark: floors where there is no GPU, rows that say where they come from, and the way to new tables."""

import dataclasses
import json

import pytest
import torch
from count_ops import CountOps

from vlmtok import kernels
from vlmtok.kernels import table
from vlmtok.kernels.bench.cases import cases, without_case
from vlmtok.kernels.bench.clock import Clock, Time
from vlmtok.kernels.bench.command import main
from vlmtok.kernels.bench.drawn_cases import DRAWS, drawn_cases, lacking
from vlmtok.kernels.bench.floors import H200, Rates
from vlmtok.kernels.bench.measuring import measure, measure_cases
from vlmtok.kernels.bench.modelling import NOT_MEASURED, modelled
from vlmtok.kernels.bench.sweep import candidates, policies, sweep
from vlmtok.kernels.policy import NEVER, Policy

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="marker gpu: there is one, it would measure")


@needs_no_gpu
def test_without_a_gpu_it_prints_floors(capsys, tmp_path):
    file = tmp_path / "floors.json"
    assert main(["--ops", "merge_rows", "energy", "--sweep", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed and "merge_rows" in printed and "match_max" not in printed
    rows = json.loads(file.read_text())
    assert {row["op"] for row in rows} == {"merge_rows", "energy"}
    assert all(row["status"] == NOT_MEASURED and "median_us" not in row for row in rows)


def test_committed_floors_are_current():
    """The file under benchmarks/results is what the code prints."""
    from pathlib import Path

    file = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels_modelled_h200.json"
    assert json.loads(file.read_text()) == modelled(cases())


def test_floors_by_hand():
    case = next(c for c in cases() if c.op == "merge_rows" and c.batch == 256)
    read, written = 577 * 1024 * 2, (577 - 58 + 1 - 1) * 1024 * 2
    assert case.bytes == pytest.approx(256 * (read + written), rel=0.01)
    assert 1e6 * case.floor(H200) == pytest.approx(134, abs=1)  # 575 MB at 4.3 TB/s
    chain = next(c for c in cases() if c.op == "greedy_select" and "k=288" in c.what)
    assert chain.floor(H200) == pytest.approx(288 * (1.3e-6 + 4 * 2880 / 80e9))
    double = Rates("modelled", 2 * 4.3e12, 790e12, 4e-6)
    assert case.floor(double) == pytest.approx(case.floor(H200) / 2)


@pytest.mark.parametrize("index", range(len(cases())), ids=lambda i: f"{cases()[i].op}-{i}")
def test_cases_launch_what_they_say(index):
    case = cases()[index]
    ours = case.calls(torch.device("meta"), torch.bfloat16)["ours"]
    with kernels.use("triton"), CountOps() as count:
        ours()
    # Not counted: slices made contiguous by other means, and the widening that tensor cores spare (meta only).
    assert count.total - count.ops["aten._to_copy.default"] == case.launches, count


@pytest.mark.parametrize("compiled", [False, True])
def test_it_measures(compiled, monkeypatch):
    """The rows of a run, on a processor: both torch paths, no Triton, no floor, no memory."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)  # a C++ compiler takes its time
    case = next(c for c in cases(small=True) if c.op == "transition_stats")
    clock = Clock(torch.device("cpu"), 5)
    rows = measure(case, clock, H200, torch.float32, compiled)
    assert [row["path"] for row in rows] == ["eager", "compile"][: 1 + compiled]
    for row in rows:
        assert row["status"] == "measured on a CPU" and 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["times_eager"] > 0 and row["max_error"] < 1e-5
        assert row["floor_us"] is row["peak_bytes"] is None
    assert rows[0]["times_eager"] == 1


def test_the_command_measures_a_processor(capsys, tmp_path):
    file = tmp_path / "rows.json"
    command = ["--device", "cpu", "--no-compile", "--repeats", "2", "--dtype", "float32", "--json", str(file)]
    assert main(command) == 0
    rows = json.loads(file.read_text())
    assert {row["op"] for row in rows} == {case.op for case in cases()}
    assert all(row["device"] and row["torch"] and row["agreement"] in (None, 1.0) for row in rows)
    assert "median_us" in capsys.readouterr().out


def test_candidates_are_other_rows_of_the_same_kernel():
    for row in table.TILES:
        others = candidates(row)
        assert len(set(others)) == len(others) > 1
        assert {(o.op, o.width, o.size, o.programs) for o in others} == {(row.op, row.width, row.size, row.programs)}


def test_sweep_puts_the_table_back(monkeypatch):
    """On meta tensors: every candidate is tried through the launcher, the fastest comes first."""
    import vlmtok.kernels.triton_common as common
    import vlmtok.kernels.triton_transition as transition

    tried = []
    monkeypatch.setattr(transition, "launch", lambda *args, warps, **rest: tried.append(warps))
    clock = Clock(torch.device("meta"), 1)
    clock.time = lambda call: (call(), Time(float(tried[-1]), 0.0, 0.0))[1]
    case = next(c for c in cases(small=True) if c.op == "transition_stats")
    case = dataclasses.replace(case, run=lambda _, x, y: transition.transition_stats(x, y))
    before = table.TILES
    results = sweep(case, clock, torch.float32)
    assert [row.warps for _, row in results] == [1, 2, 4, 8, 16, 32]
    assert table.TILES is before and transition.tile is table.tile and common.launch is not transition.launch


@pytest.fixture
def measured_rows():
    """Of a card on which one kernel wins from batch 32 on, and one loses at its greatest batch."""
    place = {"device": "GPU X", "torch": "2", "triton": "3", "way": "warm", "path": "triton"}
    rows = [{**place, "op": "energy", "batch": b, "times_eager": t} for b, t in ((1, 0.5), (32, 1.5), (256, 3.0))]
    return rows + [{**place, "op": "match_max", "batch": b, "times_eager": t} for b, t in ((1, 2.0), (32, 0.9))]


def test_policies_take_the_batch_from_which_the_kernel_wins(measured_rows):
    place = ("measured", "GPU X", "torch 2, triton 3", "kernels.json")
    # A kernel that is slower at the greatest batch is left to torch: the row for every op would take it.
    assert policies(measured_rows, "kernels.json") == [
        Policy("energy", 32, 1 << 30, *place),
        Policy("match_max", NEVER, 1 << 30, *place),
    ]


def test_thresholds_decide_for_the_card_that_was_measured_alone(measured_rows, monkeypatch):
    rows = policies(measured_rows, "kernels.json")
    monkeypatch.setattr(table, "POLICIES", (*rows, table.POLICIES[-1]))
    monkeypatch.setattr(table, "device_facts", lambda index: ("GPU X" if index == 0 else "GPU Y", True))
    decided = {
        (op, batch, index): table.prefers_triton(op, batch, 0, torch.device("cuda", index))
        for op in ("energy", "match_max")
        for batch in (1, 31, 32, 256)
        for index in (0, 1)
    }
    for (op, batch, index), triton in decided.items():
        assert triton == (index == 1 or (op == "energy" and batch >= 32)), (op, batch, index)


# ---------------------------------------------------------------------- cases of ops that nobody wrote one for
def test_every_op_with_a_kernel_has_a_case():
    """One that lands later has one too, or is said to be left out."""
    public = {op for op in kernels.ops.__all__ if op in kernels.library.LAUNCHERS}
    assert public == {case.op for case in cases()} | set(without_case()) and not without_case()
    assert public == {case.op for case in cases(small=True)}


def test_a_drawn_case_costs_what_the_written_one_does():
    (drawn,) = [c for c in drawn_cases({"merge_rows"}) if c.op == "greedy_select" and "2880" in c.what]
    written = next(c for c in cases() if c.op == "greedy_select" and c.what == "N=2880, k=288, C=4096")
    assert (drawn.flops, drawn.launches, drawn.chain) == (written.flops, written.launches, written.chain)
    features = 2 * 2880 * 4096  # the table of products is written and read within the op, and counted by hand only
    assert drawn.bytes == features + 8 + (8 + 4) * 288 and written.bytes > features


# The definition of drop_duplicates is given the lists that the op draws up; it has cases of its own.
@pytest.mark.parametrize("case", drawn_cases({"drop_duplicates"}, small=True), ids=lambda case: case.op)
def test_drawn_cases_run(case):
    """The op and its definition take what is drawn."""
    calls = case.calls(torch.device("cpu"), torch.float32)
    for ours, definition in zip(calls["ours"](), calls["eager"]()):
        torch.testing.assert_close(ours, definition, rtol=0, atol=0, equal_nan=True)


def test_an_op_with_an_unknown_argument_is_left_out_and_named(monkeypatch):
    monkeypatch.delitem(DRAWS, ("metric", "Tensor"))
    assert "energy_match" in lacking(set()) and "metric: Tensor" in lacking(set())["energy_match"]
    assert "energy_match" not in {case.op for case in drawn_cases(set(), small=True)}


# ---------------------------------------------------------------------- rivals
FPS = """
import torch
def fps(x, batch, ratio, random_start):
    assert not random_start
    found = []
    for picture in batch.unique():
        rows = (batch == picture).nonzero()[:, 0]
        own, taken = x[rows], [0]
        while len(taken) < torch.tensor(ratio * len(own)).ceil():
            taken.append(int(torch.cdist(own, own[taken]).min(1).values.argmax()))
        found += rows[taken].tolist()
    return torch.tensor(found)
"""
"""As torch-cluster documents it."""


def test_farthest_point_sampling_is_raced_where_it_is_installed(monkeypatch, tmp_path):
    case = next(c for c in cases(small=True) if c.op == "greedy_select" and "Euclidean" in c.what)
    clock = Clock(torch.device("cpu"), 2)
    assert {row["path"] for row in measure(case, clock, H200, torch.bfloat16)} == {"eager"}
    (tmp_path / "torch_cluster.py").write_text(FPS)
    monkeypatch.syspath_prepend(tmp_path)
    row = measure(case, clock, H200, torch.bfloat16)[-1]
    assert row["path"] == "torch_cluster" and row["agreement"] == 1 and row["dtype"] == "float32"
    assert row["rival"] == "torch-cluster None"  # a module without a package here


def test_column_sums_are_raced_by_the_same_quantity(monkeypatch):
    case = next(c for c in cases(small=True) if c.op == "received_attention")
    q, k = case.make(torch.device("cpu"), torch.float32)

    class Module:
        @staticmethod
        def flash_colreduce(q, k, reduction):
            assert reduction == "mean"
            return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(-2)

    (rival,) = case.rivals
    torch.testing.assert_close(rival.run(Module, q, k), case.run(kernels, q, k))
    assert rival.devices == ("cuda",)


def test_a_case_that_memory_cannot_hold_is_a_row(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    case = next(c for c in cases(small=True) if c.op == "transition_stats")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    clock = Clock(torch.device("cpu"), 1)
    chosen = [dataclasses.replace(case, make=full), case]
    (_, (lost,)), (_, rows) = measure_cases(chosen, clock, H200, torch.float32, compiled=False)
    assert lost["status"] == "not measured: out of memory" and lost["op"] == case.op and lost["device"]
    assert [row["path"] for row in rows] == ["eager"] and policies([lost, *rows], "") == []
