"""`vlmtok.timing` and `vlmtok.lab.suite`: how times become ratios, and that the suite's rows hold what they say."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from support.checkpoints import llava, picture, vit

import vlmtok
from vlmtok import loading
from vlmtok import timing as bench
from vlmtok.core.hooks import hooks_of
from vlmtok.errors import ParameterError, VlmtokError
from vlmtok.forecast.estimate import estimate, shape_of
from vlmtok.lab import compare as comparing
from vlmtok.lab import prompts, suite, suite_measure, suite_modelled, suite_models
from vlmtok.timing import Case, Ratio, Timing

SMALL = replace(
    suite_models.TINY,
    tower_batches=(1,),
    visual={"small, 5 crops": 180},
    crops={"small, 5 crops": 5},
    steps=2,
    text=(64, 4, 4, 128, 128),
    towers=("tome:r=3",),
    languages=("todre:keep=0.1:pivot=center", "fastv"),
)


# ---------------------------------------------------------------------- times and ratios
def test_a_ratio_is_the_median_of_the_rounds_ratios():
    # The machine was busy in the second round, for both: a ratio of medians would see it, the rounds' do not.
    ratio = Ratio.of(Timing((2.0, 20.0, 2.2)), Timing((1.0, 10.0, 1.0)))
    assert ratio.median == pytest.approx(2.0) and ratio.rounds == 3
    assert ratio.p20 == pytest.approx(2.0) and ratio.p80 == pytest.approx(2.0 + 0.6 * 0.2)
    assert str(ratio) == "2.00 x (2.00 to 2.12)"
    assert [bench.quantile([1.0, 2.0, 4.0], share) for share in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 4.0]


def test_cases_take_turns_from_another_start_each_round(monkeypatch):
    calls, clock = [], iter(range(10_000))
    monkeypatch.setattr(bench, "LEAST", 0.0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))

    def around(name):
        @contextlib.contextmanager
        def inside():
            calls.append(f"[{name}")
            yield
            calls.append(f"{name}]")

        return inside

    cases = [Case(name, lambda name=name: calls.append(name), around(name)) for name in "ab"]
    told = []
    found = bench.interleave(cases, rounds=2, warmup=1, progress=lambda what, done, steps: told.append((done, steps)))
    assert calls == [
        "[a",
        "a",
        "a]",
        "[b",
        "b",
        "b]",
        "[a",
        "a",
        "a]",
        "[b",
        "b",
        "b]",
        "[b",
        "b",
        "b]",
        "[a",
        "a",
        "a]",
    ]
    assert all(len(timing.seconds) == 2 for timing in found.values()) and told[-1] == (6, 6)


def test_contexts_are_outside_the_clock_and_short_calls_are_repeated():
    import time

    calls = {"slow start": 0, "fast": 0}

    @contextlib.contextmanager
    def slow():
        time.sleep(0.05)
        yield

    def call(name):
        calls[name] += 1

    cases = [Case("slow start", lambda: call("slow start"), slow), Case("fast", lambda: call("fast"))]
    found = bench.interleave(cases, rounds=1)
    assert found["slow start"].median < 0.01
    assert calls["fast"] == 2 + 100  # as many as are allowed: one call is far shorter than what is timed


def test_the_limit_ends_the_measurement_after_a_round():
    found = bench.interleave([Case("a", lambda: None)], rounds=50, limit=0)
    assert len(found["a"].seconds) == 1
    with pytest.raises(ParameterError, match="rounds=0"):
        bench.interleave([Case("a", lambda: None)], rounds=0)


def test_break_even_from_one_measurement():
    # Bare time 1 at 100 tokens; half of the MACs go; deciding costs 0.1: with n tokens n/100 / 2 = 0.1, n = 20.
    assert bench.break_even(100, 1 / (0.5 + 0.1), 2.0) == pytest.approx(20)
    assert bench.break_even(100, 2.5, 2.0) == 0.0
    assert bench.break_even(100, 0.9, 1.0) is None


def test_break_even_from_a_sweep():
    assert suite.crossing([(16, 0.5), (64, 1.5), (256, 3.0)]) == pytest.approx(32)
    assert suite.crossing([(16, 1.2), (64, 0.8), (256, 1.2)]) == pytest.approx(128)
    assert suite.crossing([(16, 1.1), (64, 2.0)]) == 16
    assert suite.crossing([(16, 0.5), (64, 0.9)]) is None


def test_environment_and_tables(tmp_path):
    where = bench.environment("cpu")
    assert where["torch"] == torch.__version__.split("+")[0] and where["vlmtok"] == vlmtok.__version__
    assert where["device_type"] == "cpu" and where["driver"] is None and where["device"]
    bench.write_rows(tmp_path / "rows.csv", [{"a": 1, "b": 2.5}, {"a": 3, "c": "x"}])
    assert (tmp_path / "rows.csv").read_text().split() == ["a,b,c", "1,2.5,", "3,,x"]
    assert bench.peak_bytes(Case("a", lambda: None), "cpu") is None


# ---------------------------------------------------------------------- the suite
@pytest.fixture(scope="module")
def rows():
    return suite.run_suite(torch.device("cpu"), sizes=SMALL, rounds=1, limit=0)


def test_the_suite_measures_every_stage_of_every_method(rows):
    found = {(row["model"], row["stage"], row["method"]) for row in rows}
    for method in SMALL.towers:
        assert ("tiny tower", "tower", method) in found
    for method in SMALL.languages:
        for stage in ("prefill", "generate", "tower + generate"):
            assert ("small, 5 crops", stage, method) in found
        assert ("break-even", "break-even", method) in found
    for row in rows:
        assert row["measured"] and row["device"] and row["torch"] and row["dtype"] == "float32"
        assert row["seconds"] is None and row["seconds_bare"] is None  # no absolute times of a CPU
        if row["speedup"] is not None:
            assert row["of_promise"] == pytest.approx(row["speedup"] / row["mac_ratio"])
            assert row["p20"] <= row["speedup"] <= row["p80"] and row["rounds"] == 1


def test_the_promise_is_that_of_estimate(rows):
    shape = shape_of(suite_models.llava_config(SMALL))
    found = {(row["stage"], row["method"]): row for row in rows if row["model"] == "small, 5 crops"}
    method = "fastv"
    lm = replace(shape, vision=None, projector=(), visual=180)
    lm = replace(lm, layout=replace(lm.layout, stages={k: lm.layout.stages[k] for k in ("projected", "decoder")}))
    report = estimate(lm, method, text_tokens=(1, suite_models.TEXT_TOKENS - 1))
    before, after = suite_measure.macs_of(report, "prefill")
    row = found["prefill", method]
    assert row["mac_ratio"] == pytest.approx(before / after)
    assert row["kv_bytes_bare"] == report.cache.before and row["kv_bytes"] == report.cache.after.high
    # The whole answer adds steps, and the tower adds what no method here saves.
    assert found["tower + generate", method]["mac_ratio"] < found["generate", method]["mac_ratio"] < row["mac_ratio"]


def test_stages_add_up():
    shape = shape_of(suite_models.llava_config(suite_models.TINY))
    report = estimate(shape, "tome:r=3+fastv", visual_tokens=36)
    for side in (0, 1):
        tower, prefill, step = (suite_measure.macs_of(report, stage)[side] for stage in ("tower", "prefill", "decode"))
        deciding = 0 if side == 0 else report.line("signals").after.high + report.line("method").after.high
        whole = suite_measure.macs_of(report, "tower + generate", 5)[side]
        assert whole == tower + prefill + 5 * step - deciding
        assert suite_measure.macs_of(report, "tower + prefill", 5)[side] == tower + prefill - deciding
    assert suite_measure.macs_of(report, "tower + prefill") == (report.macs.before, report.macs.after.high)


def test_the_models_of_the_suite_are_the_published_shapes():
    from vlmtok.forecast.presets import preset

    llava_shape, published = shape_of(suite_models.llava_config(suite_models.FULL)), preset("llava-1.5-7b")
    stored = {block.kv_bytes for block in published.language.blocks}  # a preset is in half precision
    assert [replace(block, kv_bytes=stored) for block in llava_shape.language.blocks] == [
        replace(block, kv_bytes=stored) for block in published.language.blocks
    ]
    assert llava_shape.vision.blocks == published.vision.blocks and llava_shape.visual == 576
    assert suite_models.FULL.visual["LLaVA-NeXT-7B shape"] == preset("llava-next-7b").visual == 2880


def test_without_a_gpu_there_are_floors_and_no_measurement():
    rows = suite_modelled.model_suite()
    towers = len(suite_models.FULL.towers) * len(suite_models.FULL.tower_batches)
    languages = 2 * len(suite_models.FULL.languages) * len(suite_models.FULL.batches) * len(suite_models.FULL.visual)
    assert len(rows) == towers + languages
    for row in rows:
        assert row["measured"] is False and row["speedup"] is None and row["floor_of"] == "H200"
        assert 0 < row["floor_seconds"] <= row["floor_seconds_bare"] and row["mac_ratio"] > 1
    step = next(row for row in rows if row["stage"] == "decode" and row["batch"] == 1)
    # A step reads 6.6 G weights of two bytes, and the cache.
    assert step["floor_seconds_bare"] == pytest.approx((2 * 6.607e9 + step["kv_bytes_bare"]) / 4.3e12, rel=0.01)
    prefill = next(row for row in rows if row["stage"] == "prefill" and "todre" in row["method"] and row["batch"] == 1)
    assert prefill["floor_speedup"] < prefill["mac_ratio"]  # the weights must be read whatever is dropped


# ---------------------------------------------------------------------- one model, one method
def test_a_vision_language_model_with_one_method(tmp_path):
    model = loading.load(str(llava(tmp_path)))
    question = "what color is the circle ?"
    rows = suite.bench_pair(
        model, picture(), question, "divprune:keep=0.1", batch=2, max_new_tokens=3, rounds=1, limit=0
    )
    stages = {row["stage"]: row for row in rows}
    assert {"tower + prefill", "tower + generate"} <= set(stages)
    row = stages["tower + prefill"]
    assert row["batch"] == 2 and row["visual_tokens"] == 144 and row["method"] == "divprune:keep=0.1"
    with vlmtok.compress(model.model, "divprune:keep=0.1") as run, torch.no_grad():
        model.model.generate(**prompts.encode_prompt(model, picture(), question, 2), max_new_tokens=1)
    total = run.report().macs
    assert row["mac_ratio"] == pytest.approx(total.before / total.after.high)
    assert not list(hooks_of(model.model))


def test_a_tower_with_its_default_method(tmp_path):
    model = loading.load(str(vit(tmp_path)))
    (row,) = suite.bench_pair(model, picture(), None, batch=3, rounds=2, limit=math.inf)
    assert row["method"] == comparing.DEFAULT_TOWER_METHOD and row["stage"] == "tower" and row["rounds"] == 2
    assert row["visual_tokens"] == 36 and row["speedup"] > 0
    with pytest.raises(ParameterError, match="batch=0"):
        suite.bench_pair(model, picture(), None, batch=0)
    with pytest.raises(VlmtokError):
        suite.bench_pair(model, picture(), None, "fastv")
    assert not list(hooks_of(model.model))


@pytest.mark.gpu
def test_a_gpu_gives_seconds_and_peak_memory():
    rows = suite.run_suite(torch.device("cuda"), sizes=SMALL, rounds=1, limit=0)
    for row in rows:
        if row["speedup"] is not None:
            assert row["seconds"] > 0 and row["seconds_bare"] > 0 and row["dtype"] == "bfloat16" and row["driver"]
    for stage in ("tower", "tower, CUDA graph"):
        assert {row["kernels"] for row in rows if row["stage"] == stage} == {"auto", "torch"}
    assert all(row["peak_bytes"] > 0 for row in rows if row["stage"] == "prefill")
