"""Which path runs, who is told, and what import costs."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import gpu_calls
import pytest
import torch

from vlmtok import kernels
from vlmtok.errors import ParameterError, VlmtokError
from vlmtok.kernels import dispatch, table
from vlmtok.kernels.policy import Policy

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def python(code, **environment):
    """A fresh interpreter, because the environment is read at import."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_import_is_light_and_free_of_triton():
    done = python(
        "import sys, time, torch\n"
        "start = time.perf_counter(); import vlmtok.kernels; took = time.perf_counter() - start\n"
        "assert not any(name.split('.')[0] == 'triton' for name in sys.modules), 'triton was imported'\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "x = torch.randn(1, 4, 8); vlmtok.kernels.match_max(x, x)\n"
        "assert 'triton' not in sys.modules, 'the torch path imported triton'\n"
        "assert took < 0.2, took"
    )
    assert done.returncode == 0, done.stderr


def test_environment_variable():
    code = "from vlmtok import kernels; print(kernels.mode())"
    assert python(code, VLMTOK_KERNELS="torch").stdout.strip() == "torch"
    done = python(code, VLMTOK_KERNELS="cuda")
    assert "ParameterError" in done.stderr and "auto, torch, triton" in done.stderr


def test_use_nests_and_restores():
    before = kernels.mode()
    with kernels.use("torch"):
        with pytest.raises(RuntimeError), kernels.use("triton"):
            assert kernels.mode() == "triton"
            raise RuntimeError
        assert kernels.mode() == "torch"
    assert kernels.mode() == before
    with pytest.raises(ParameterError, match="auto, torch, triton"), kernels.use("cuda"):
        pass


def calls():
    """Every op with a kernel, on CPU."""
    x = torch.randn(1, 6, 8)
    index = torch.arange(3).unsqueeze(0)
    q = torch.randn(1, 2, 6, 8)
    return {
        "match_max": lambda: kernels.match_max(x, x),
        "energy": lambda: kernels.energy(x, margin=0.5),
        "bipartite_match": lambda: kernels.bipartite_match(x, 2),
        "energy_match": lambda: kernels.energy_match(x, 2, margin=0.5),
        "complete_match": lambda: kernels.complete_match(x, torch.zeros(1, 6), 2),
        "guided_match": lambda: kernels.guided_match(x, x[:, 0], 2),
        "merge_rows": lambda: kernels.merge_rows(x, torch.ones(1, 6), index, index + 3, index),
        "greedy_select": lambda: kernels.greedy_select(x, 3, torch.tensor([0])),
        "greedy_cover": lambda: kernels.greedy_cover(x, 3),
        "greedy_cover_cosine": lambda: kernels.greedy_cover_cosine(x, 3),
        "greedy_determinant": lambda: kernels.greedy_determinant(x, 3),
        "drop_duplicates": lambda: kernels.drop_duplicates(x, 3),
        "transition_stats": lambda: kernels.transition_stats(x, x),
        "received_attention": lambda: kernels.received_attention(q, q, scale=0.3),
        "causal_column_sums": lambda: kernels.causal_column_sums(q, q, scale=0.3),
    }


@pytest.mark.parametrize("op", calls())
def test_triton_is_never_replaced_silently(op):
    """A CPU tensor, or a dtype that the kernels do not take: an error that says what is possible."""
    with kernels.use("triton"), pytest.raises(kernels.KernelError, match="VLMTOK_KERNELS") as problem:
        calls()[op]()
    assert op in str(problem.value) and isinstance(problem.value, VlmtokError)


@pytest.mark.parametrize("batch, n", [(1, 1), (2, 57)])
def test_what_a_gpu_is_asked_is_asked_rightly(batch, n):
    """Where there is no GPU, its tests are skipped: their calls run here, so that none is an error there."""
    asked = gpu_calls.calls(batch, n, dtype=torch.float32, device="cpu")
    assert list(asked) == list(gpu_calls.NAMES)
    for call in asked.values():
        call()


def test_a_model_on_the_cpu_says_that_triton_cannot_run():
    from support.models import TOWERS

    import vlmtok

    tower = TOWERS["timm ViT"]
    model = tower.build()
    with torch.no_grad(), vlmtok.compress(model, "tome:r=3"):
        with kernels.use("triton"), pytest.raises(kernels.KernelError, match=r"bipartite_match: .* is on cpu"):
            tower.run(model, tower.pictures())
        tower.run(model, tower.pictures())  # the next pass is not harmed


def test_limits_of_a_kernel_are_errors_too():
    with kernels.use("triton"):
        x = torch.empty(1, table.LIMIT_GREEDY + 1, 4, device="meta")
        with pytest.raises(kernels.KernelError, match=str(table.LIMIT_GREEDY)):
            kernels.greedy_select(x, 2, torch.empty(1, dtype=torch.int64, device="meta"))
        for op in (kernels.greedy_cover, kernels.greedy_cover_cosine):
            with pytest.raises(kernels.KernelError, match=str(table.LIMIT_GREEDY)):
                op(x, 2)
        with pytest.raises(kernels.KernelError, match=str(table.LIMIT_GREEDY)):
            kernels.greedy_determinant(x, 2)
        q = torch.empty(1, 1, 4, table.LIMIT_HEAD * 2, device="meta")
        with pytest.raises(kernels.KernelError, match="head width"):
            kernels.received_attention(q, q, scale=1.0)
        with pytest.raises(kernels.KernelError, match="head width"):
            kernels.causal_column_sums(q, q, scale=1.0)
        with pytest.raises(kernels.KernelError, match="5 sets of rows exceed 4"):
            kernels.causal_column_sums(q[..., :8], q[..., :8], scale=1.0, sets=[None] * 5)
        wide = torch.empty(1, 4, 8, dtype=torch.float64, device="meta")
        with pytest.raises(kernels.KernelError, match="float64"):
            kernels.match_max(wide, wide)
        with pytest.raises(kernels.KernelError, match="float64"):
            kernels.match_max(wide.float(), wide)


@pytest.mark.parametrize("op", calls())
def test_ran_names_the_path(op):
    kernels.ran(reset=True)
    with kernels.use("auto"):
        calls()[op]()
    assert kernels.ran()[f"{op}:torch"] == 1
    assert kernels.ran(reset=True) and kernels.ran() == {}


def test_ran_since():
    kernels.ran(reset=True)
    calls()["energy"]()
    before = kernels.ran()
    calls()["energy"]()
    calls()["match_max"]()
    assert kernels.ran(since=before) == {"energy:torch": 1, "match_max:torch": 1}
    kernels.ran(reset=True)
    calls()["match_max"]()
    assert kernels.ran(since=before) == {"match_max:torch": 1}, "after a reset there is nothing to take off"


def test_the_report_names_the_path():
    """Of the calls of this compression; what ran before it is not told."""
    from support.models import TOWERS

    import vlmtok

    tower = TOWERS["timm ViT"]
    model = tower.build()
    calls()["energy"]()
    with torch.no_grad(), vlmtok.compress(model, "tome:r=3") as run:
        tower.run(model, tower.pictures())
        report = run.report()
    depth = len(model.blocks)
    ran = {name: count for name, count in report.kernels.items() if "attention" not in name}
    assert ran == {"bipartite_match:torch": depth, "merge_rows:torch": depth}
    said = f"kernels: bipartite_match on torch ({depth}), merge_rows on torch ({depth})"
    assert said in str(report) and said in report.to_markdown()


def test_auto_tells_once_why_it_takes_torch(caplog):
    dispatch._told.clear()
    with caplog.at_level(logging.INFO, logger="vlmtok.kernels"), kernels.use("auto"):
        calls()["energy"]()
        calls()["energy"]()
    assert [record.getMessage() for record in caplog.records] == [
        "energy takes the torch path: the tensor is on cpu and Triton compiles for CUDA and HIP devices"
    ]


def test_rows_say_where_they_come_from():
    for row in table.POLICIES:
        if row.basis == "measured":
            assert row.device and row.versions
            rows = json.loads((RESULTS / row.source).read_text())
            mine = [r for r in rows if (r["op"], r["path"], r["way"]) == (row.op, "triton", "warm")]
            assert {r["device"] for r in mine} == {row.device}
            assert mine and all(r["times_eager"] >= 1 for r in mine if r["batch"] >= row.min_batch)
        else:
            assert row.basis == "modelled" and not row.device and not row.source


def test_measured_rows_hold_on_their_device_only(monkeypatch):
    rows = (
        Policy("*", 32, 1 << 30, "modelled"),
        Policy("energy", 1, 0, "measured", "GPU X", "torch 2", "kernels_x.json"),
    )
    monkeypatch.setattr(table, "POLICIES", rows)
    monkeypatch.setattr(table, "_facts", {0: ("GPU X", True), 1: ("GPU Y", True)})
    assert table.prefers_triton("energy", 1, 0, torch.device("cuda", 0))
    assert not table.prefers_triton("energy", 1, 0, torch.device("cuda", 1))
    assert not table.prefers_triton("match_max", 1, 0, torch.device("cuda", 0))


def test_old_devices_take_torch(monkeypatch):
    """On tensors that only say they are on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table, "_facts", {0: ("GPU T", False)})
    with FakeTensorMode():
        x = torch.empty(64, 8, 8, device="cuda")
    assert not dispatch.choose("energy", x, batch=64)
    with kernels.use("triton"), pytest.raises(kernels.KernelError, match=r"8\.0"):
        dispatch.choose("energy", x, batch=64)
    monkeypatch.setattr(table, "_facts", {0: ("GPU A", True)})
    assert dispatch.choose("energy", x, batch=1)
    monkeypatch.setattr(table, "POLICIES", (Policy("*", 32, 1 << 30, "modelled"),))
    assert dispatch.choose("energy", x, batch=64) and not dispatch.choose("energy", x, batch=1)
    assert dispatch.choose("energy", x, batch=1, pair_bytes=1 << 30)


def test_device_facts_are_constants_under_compile(monkeypatch):
    """Asking a driver would break the graph."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: os.path.realpath(os.devnull))
    monkeypatch.setattr(table, "_facts", {})
    torch._dynamo.reset()
    double = torch.compile(lambda x: x * len(table.device_facts(0)[0]), fullgraph=True, backend="eager")
    assert double(torch.ones(1)) == len(os.devnull)


def test_every_size_has_a_tile():
    for op in {row.op for row in table.TILES}:
        for width in (2, 4):
            for size in (1, 64, 65, 200, 256):
                for rows in (1, 10_000, 1_000_000):
                    assert table.tile(op, width, size, rows).op == op
    assert table.tile("greedy_select", 4, table.LIMIT_GREEDY).n == table.LIMIT_GREEDY
    with pytest.raises(LookupError, match="no tile"):
        table.tile("greedy_select", 4, table.LIMIT_GREEDY + 1)
