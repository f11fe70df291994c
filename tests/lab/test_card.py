"""`vlmtok bench --all`: parts, their marks, the page, the plot, rows for the dispatch table. No times are asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlmtok import kernels
from vlmtok.errors import MissingPackage, ParameterError
from vlmtok.kernels import table
from vlmtok.kernels.bench.cases import cases
from vlmtok.kernels.bench.modelling import NOT_MEASURED, modelled
from vlmtok.kernels.policy import Policy, read_policies
from vlmtok.lab import suite, suite_models
from vlmtok.lab.card import PARTS, launches, measure_card, measuring, page, roofline

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FEW = replace(
    suite_models.TINY, tower_batches=(1,), visual={"tiny shape": 36}, crops={"tiny shape": 1}, steps=2, sweep=(16,),
    text=(64, 4, 4, 128, 128), towers=("tome:r=3",), languages=("fastv",),
)  # fmt: skip


def rows_of(path):
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def modelled_card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modelled")
    return folder, measure_card(folder, CPU)


def test_without_a_gpu_every_figure_is_modelled_or_counted(modelled_card):
    folder, found = modelled_card
    names = [f"{part}_modelled_h200.json" for part in PARTS]
    assert [path.name for path in found.files] == [*names, "card_modelled_h200.md", "roofline_modelled_h200.svg"]
    assert found.status == {"kernels": NOT_MEASURED, "launches": launches.COUNTED, "models": NOT_MEASURED}
    assert found.policies is None
    marks = {part: {row["status"] for row in rows_of(folder / f"{part}_modelled_h200.json")} for part in PARTS}
    assert marks == {"kernels": {NOT_MEASURED}, "launches": {launches.COUNTED}, "models": {NOT_MEASURED}}
    assert rows_of(folder / "kernels_modelled_h200.json") == modelled(cases())
    text = (folder / "card_modelled_h200.md").read_text("utf-8")
    assert text.count("**Modelled, not measured") == 2 and "times as fast" not in text and "Policy(" not in text
    assert "Medians" not in text and "extrapolated" not in text and text.count("what counting promises") == 1
    svg = (folder / "roofline_modelled_h200.svg").read_text("utf-8")
    assert "modelled for an H200, not measured" in svg and "measured on NVIDIA" not in svg


@pytest.fixture(scope="module")
def tiny_card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "TINY", FEW)
        return folder, measure_card(folder, CPU, tiny=True, rounds=1, limit=0, repeats=1, compiled=False)


def test_a_trial_on_a_cpu_says_so_everywhere(tiny_card):
    folder, found = tiny_card
    said = "measured on a CPU"
    assert found.status == {"kernels": said, "launches": launches.COUNTED, "models": said} and found.policies is None
    for part in ("kernels", "models"):
        rows = rows_of(folder / f"{part}_cpu_tiny.json")
        assert {row["status"] for row in rows} == {"measured on a CPU"} and {row["device_type"] for row in rows} == {
            "cpu"
        }
        assert all(row["torch"] == torch.__version__.partition("+")[0] or row["torch"] for row in rows)
    ops = rows_of(folder / "kernels_cpu_tiny.json")
    assert {row["op"] for row in ops} == {case.op for case in cases(small=True)} and {r["path"] for r in ops} >= {
        "eager"
    }
    assert all(row["rate_basis"] == "measured on a CPU" and row["rate_copy"] > 0 for row in ops)
    assert all(row["rate_assumed"] == "step, stream" for row in ops), "no machine measures these"
    models = rows_of(folder / "models_cpu_tiny.json")
    assert {row["stage"] for row in models} >= {"tower", "prefill", "generate", "tower + generate", "break-even"}
    text = (folder / "card_cpu_tiny.md").read_text("utf-8")
    assert text.startswith("# What one card does: cpu_tiny, sizes of a trial\n") and "`pays from`" in text
    assert text.count("**Measured on a CPU, at small sizes") == 2 and "measured on a CPU" in (
        folder / "roofline_cpu_tiny.svg"
    ).read_text("utf-8")


def test_launches_are_those_of_the_counter(tiny_card):
    """ToMe adds 4 launches a layer, as in tests/kernels/test_count.py, and one at the start."""
    (row,) = rows_of(tiny_card[0] / "launches_cpu_tiny.json")
    assert row["launches"] - row["launches_bare"] == 4 * row["layers"] + 1 == 17
    deeper = replace(FEW, tower=(64, 5, *FEW.tower[2:]))
    (more,) = launches.tower_launches(deeper, None)
    assert more["launches"] - row["launches"] - (more["launches_bare"] - row["launches_bare"]) == 4


def test_attention_counts_as_one_launch():
    q = torch.empty(1, 2, 5, 8, device="meta")
    assert launches._counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 1
    assert launches._counted(lambda: q + q) == 1


def test_launches_without_triton_are_said_not_to_be_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(launches, "HAS_TRITON", False)
    found = measure_card(tmp_path, CPU, parts=["launches"])
    (row,) = rows_of(found.files[0])
    assert row["status"].startswith("not counted") and row["status"] in found.files[-1].read_text("utf-8")


def test_parts_are_measured_one_after_the_other(tmp_path, modelled_card):
    measure_card(tmp_path, CPU, parts=["launches"])
    text = (tmp_path / "card_modelled_h200.md").read_text("utf-8")
    assert "## Launches" in text and "## Kernels" not in text and not list(tmp_path.glob("*.svg"))
    measure_card(tmp_path, CPU, parts=["models", "kernels"])
    whole = (modelled_card[0] / "card_modelled_h200.md").read_text("utf-8")
    assert (tmp_path / "card_modelled_h200.md").read_text("utf-8") == whole


def test_what_is_measured_is_kept_when_the_rest_is_stopped(tmp_path, monkeypatch):
    def stopped(chosen, *_):
        yield chosen[0], [{"op": chosen[0].op, "status": "measured on a CPU"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure_cases", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_card(tmp_path, CPU, tiny=True, parts=["kernels"], repeats=1)
    assert len(rows_of(tmp_path / "kernels_cpu_tiny.json")) == 1


# ---------------------------------------------------------------------- rows of a GPU, as it would give them
def of_a_gpu(batch, path, way, median, eager):
    place = {"device": "GPU X", "device_type": "cuda", "driver": "1", "torch": "2", "triton": "3", "status": "measured"}
    rates = {"rate_copy": 1e12, "rate_product": 1e14}
    size = {"op": "energy", "case": "N=9", "batch": batch, "dtype": "bfloat16", "flops": 10**9, "bytes": 10**6}
    rival = "flash-colreduce 0.2" if path == "flash_colreduce" else None
    figures = {"median_us": median, "times_eager": eager, "percent_of_floor": 50.0, "rival": rival}
    return {**size, "path": path, "way": way, **figures, **place, **rates}


GPU = [
    of_a_gpu(1, "eager", "warm", 10.0, 1.0),
    of_a_gpu(1, "triton", "warm", 12.0, 0.8),
    of_a_gpu(1, "triton", "warm, CUDA graph", 4.0, 2.0),
    of_a_gpu(8, "eager", "warm", 30.0, 1.0),
    of_a_gpu(8, "flash_colreduce", "warm", 25.0, 1.2),
    of_a_gpu(8, "triton", "warm", 15.0, 2.0),
    {"op": "match_max", "case": "N=9", "batch": 1, "path": None, "way": None, "status": "not measured: out of memory"},
]


def test_the_page_of_a_gpu(tmp_path):
    (tmp_path / "kernels_gpu_x.json").write_text(json.dumps(GPU))
    (text, _, _), kept = page.write_page(tmp_path, "gpu_x", tiny=False)
    said = text.read_text("utf-8")
    assert "**Measured.** GPU X, driver 1, torch 2, triton 3, flash-colreduce 0.2, bfloat16." in said
    assert "| energy | N=9 | 1 | 10 | 4 |  | 2 | 50 |" in said, "as a CUDA graph where there is one"
    assert "| energy | N=9 | 8 | 30 | 15 | 25 | 2 | 50 |" in said
    assert "- match_max, N=9, batch 1: not measured: out of memory" in said
    expected = Policy("energy", 8, 1 << 30, "measured", "GPU X", "torch 2, triton 3", "kernels_gpu_x.json")
    assert kept == tmp_path / "policies_gpu_x.json" and read_policies(kept) == (expected,)
    assert "| energy | the kernel from batch 8 on |" in said and "VLMTOK_POLICIES" in said
    assert page.thresholds_of([{**row, "status": "measured on a CPU"} for row in GPU], "kernels_cpu.json") == []
    kept.unlink()
    assert page.write_page(tmp_path, "gpu_x", tiny=True)[1] is None and not kept.exists()


def test_the_table_holds_what_the_committed_rows_give():
    found = page.thresholds_of(rows_of(RESULTS / "kernels_h200.json"), "kernels_h200.json")
    assert set(found) == {row for row in table.POLICIES if row.device == "NVIDIA H200"} and len(found) == 10


def test_points_of_the_roofline():
    points = roofline.points_of(GPU)
    assert [(path, row["batch"], pytest.approx(1e6 * seconds)) for path, row, seconds in points] == [
        ("eager", 1, 10), ("triton", 1, 4), ("eager", 8, 30), ("flash_colreduce", 8, 25), ("triton", 8, 15),
    ]  # fmt: skip
    assert roofline.rates_of(GPU) == (1e12, 1e14)
    by_hand = next(row for row in modelled(cases()) if row["op"] == "match_max" and row["batch"] == 256)
    ((path, _, seconds),) = roofline.points_of([by_hand])
    assert path == "floor" and seconds == pytest.approx(by_hand["floor_us"] * 1e-6)
    assert by_hand["flops"] / seconds <= roofline.rates_of([by_hand])[1] * 1.001  # under the roof


# ---------------------------------------------------------------------- memory, and bad input
def test_models_that_memory_cannot_hold_are_named_and_the_rest_goes_on(monkeypatch):
    measure = suite.measure

    def full(subject, *args, **kwargs):
        if "generate" in subject.calls:
            raise torch.OutOfMemoryError("no room")
        return measure(subject, *args, **kwargs)

    monkeypatch.setattr(suite, "measure", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    lost = []
    rows = suite.run_suite(CPU, sizes=FEW, rounds=1, limit=0, lost=lost)
    assert lost == ["tiny shape, batch 1"] and {row["stage"] for row in rows} == {"tower", "break-even"}
    with pytest.raises(torch.OutOfMemoryError):
        suite.run_suite(CPU, sizes=FEW, rounds=1, limit=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parts": ["towers"]}, "no part 'towers'; one or more of kernels, launches, models"),
        ({"parts": []}, "no part at all"),
        ({"folder": "nowhere"}, "no folder 'nowhere'"),
    ],
)
def test_bad_input(given, words, tmp_path):
    with pytest.raises(ParameterError, match=words):
        measure_card(**{"folder": tmp_path, "device": CPU, **given})
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_is_told_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match="matplotlib"):
        measure_card(tmp_path, CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "TINY", FEW)
    found = measure_card(tmp_path, torch.device("cuda"), tiny=True, rounds=1, limit=0, repeats=3)
    rows = {path.name.partition("_")[0]: rows_of(path) for path in found.files if path.suffix == ".json"}
    assert set(found.status.values()) == {"measured"} and {row["status"] for part in rows.values() for row in part} == {
        "measured"
    }
    assert {row["path"] for row in rows["kernels"]} >= {"eager", "compile", "triton"}
    assert all(row["launches"] > row["launches_bare"] > 0 for row in rows["launches"])
    assert kernels.mode() == "auto"
