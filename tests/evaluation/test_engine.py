"""`evaluate()` on eight circles: rows, costs, seeds, kills, refusals, and questions about pages by hand."""

import csv
import io
import json

import pytest
import torch
from support.circles import COLOURS, Circles

import vlmtok
from vlmtok.dispatcher import dispatcher_of
from vlmtok.errors import InternalError, ParameterError, PassError
from vlmtok.evaluation import costs
from vlmtok.evaluation.engine import evaluate, fingerprint
from vlmtok.forecast.budget import measure
from vlmtok.loading import load

pytestmark = pytest.mark.filterwarnings("ignore:the hooks of")

HOW = {"methods": ["todre", "fastv"], "keep": [0.5, 0.1], "repeats": 2, "batch": 4}


@pytest.fixture(scope="module")
def model():
    return load(device="cpu")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A sweep that nothing stopped, its task and its journal."""
    folder, task = tmp_path_factory.mktemp("whole"), Circles()
    found = evaluate(task, model, **HOW, folder=folder)
    return found, task, folder / "circles.jsonl"


def over(found, kind="all"):
    return {(one["asked"], one["keep"]): one for one in found.to_records() if one["kind"] == kind}


# ---------------------------------------------------------------------- rows
def test_rows(whole):
    found, task, _ = whole
    rows = over(found)
    methods = [
        ("none", 1.0),
        *((name, keep) for name in ("random", "downsample", "todre", "fastv") for keep in (0.5, 0.1)),
    ]
    assert list(rows) == methods and len(found.to_records()) == 3 * len(rows)
    assert rows["fastv", 0.1]["problem"].startswith("fastv on") and rows["fastv", 0.1]["quality"] is None
    for (name, keep), row in rows.items():
        if row["problem"]:
            continue
        assert row["questions"] == 8 and row["repeats"] == (2 if name in ("random", "todre") else 1)
        if name == "downsample":
            assert row["visual_tokens"] == {0.5: 64, 0.1: 9}[keep]
        else:
            assert row["visual_tokens"] == pytest.approx(144 * keep, rel=0.07)
    assert rows["none", 1.0]["quality"] == 1 and rows["none", 1.0]["difference"] is None
    assert rows["random", 0.1]["quality"] < 1 and rows["random", 0.1]["difference"] < 0
    # Four batches of none and FastV, and of the smaller pictures, whose batch is one group; repeats have as many again.
    assert len(task.asked) == 2 * (1 + 2 * 2 + 2 + 2 * 2 + 1)


def test_figures_are_those_of_the_journal(whole):
    """Quality, its difference and further figures, counted here line by line; kinds apart and together."""
    found, _, path = whole
    lines = [json.loads(line) for line in path.read_text().splitlines()][1:]
    asked = 0
    for side, ids in (
        ("left", {f"{c} left" for c in COLOURS}),
        ("all", {f"{c} {s}" for c in COLOURS for s in ("left", "right")}),
    ):
        rows = over(found, side)
        bare = [line["quality"] for line in lines if line["way"] == "none" and line.get("id") in ids]
        for (name, keep), row in rows.items():
            if row["problem"]:
                continue
            key = "none" if name == "none" else f"{row['spec']} @ {keep:g}"
            told = [line for line in lines if line["way"] == key and line.get("id") in ids]
            assert len(told) == row["repeats"] * row["questions"] == row["repeats"] * len(ids)
            quality = sum(line["quality"] for line in told) / len(told)
            assert row["quality"] == pytest.approx(quality, rel=1e-5)
            letters = sum(len(line["answer"]) for line in told) / len(told)
            assert row["letters"] == pytest.approx(letters, rel=1e-5)
            if name != "none":
                assert row["difference"] == pytest.approx(quality - sum(bare) / len(bare), abs=1e-6)
                assert row["low"] <= row["difference"] <= row["high"]
            asked += len(told)
    assert asked > 100


@pytest.mark.parametrize("name, keep", [("todre", 0.1), ("random", 0.5), ("fastv", 0.5)])
def test_costs_are_those_of_a_report_by_hand(whole, model, name, keep):
    found, _, _ = whole
    row, bare = over(found, "left")[name, keep], over(found, "left")["none", 1.0]
    task = Circles()
    with vlmtok.compress(model.model, row["spec"]) as run, torch.inference_mode():
        task.probe(model, task.items(1)[0])
        report = run.report()
    for column, what in (("visual_tokens", "layer_average_tokens"), ("macs", "macs"), ("kv_bytes", "kv_bytes")):
        before, after = measure(report, what)
        assert row[column] == pytest.approx(after, rel=1e-5) and bare[column] == pytest.approx(before, rel=1e-5)
    assert row["macs_ratio"] == pytest.approx(report.macs.before / report.macs.after.high, rel=1e-5)
    own = report.line("signals").after.high + report.line("method").after.high
    assert row["pruner_share"] == pytest.approx(own / report.macs.after.high, rel=1e-5)
    assert bare["pruner_share"] == 0 and bare["macs_ratio"] == 1
    assert (own > 0) == (name != "random")


def test_a_smaller_picture_costs_what_its_model_costs(whole, model):
    """Nine tokens: what the twin for 32 pixels counts without a method."""
    found, _, _ = whole
    row, task = over(found)["downsample", 0.1], Circles()
    small = vlmtok.evaluation.downsample.downsample(model, task.pictures(task.items(1)[0]), tokens=0.1)
    told = costs.cost_of(task, small.loaded, task.items(1)[0], vlmtok.evaluation.ways.Way("none", "none"))
    assert small.tokens == 9 == told["visual_tokens"]
    assert row["macs"] == pytest.approx(told["macs"], rel=1e-5) and row["macs"] < over(found)["random", 0.1]["macs"]


def test_every_row_says_what_it_was_measured_with(whole):
    found, _, _ = whole
    for row in csv.DictReader(io.StringIO(found.to_csv())):
        assert row["torch"] == torch.__version__.partition("+")[0] or row["torch"] == torch.__version__
        assert row["seed"] == "0" and row["dtype"] == "float32" and row["settings"] == "batch=4; text_tokens=16"
        assert row["vlmtok"] and row["transformers"] and row["device"] and row["convention"]


def test_latency_is_measured_where_it_is_asked_for(model, tmp_path):
    """Also of a sweep whose answers are there already."""
    how = {"methods": "scope", "keep": 0.5, "baselines": False, "limit": 2, "folder": tmp_path}
    task = Circles()
    first = over(evaluate(task, model, **how))
    asked = len(task.asked)
    timed = over(evaluate(task, model, **how, latency_rounds=1))
    assert len(task.asked) == asked  # only the time is new
    assert first["scope", 0.5]["latency_ratio"] is None and timed["scope", 0.5]["latency_ratio"] > 0
    assert timed["none", 1.0]["latency_ratio"] is None
    probed = task.probed
    assert over(evaluate(task, model, **how, latency_rounds=1)) == timed and task.probed == probed


# ---------------------------------------------------------------------- again
def test_the_same_seed_is_the_same_table(whole, model):
    found, _, _ = whole
    assert evaluate(Circles(), model, **HOW).to_csv() == found.to_csv()
    assert dispatcher_of(model.model) is None


def test_another_seed_draws_other_tokens(model):
    how = {"methods": "random", "keep": 0.1, "repeats": 2, "baselines": False}
    first, again, other = (evaluate(Circles(), model, **how, seed=seed) for seed in (0, 0, 1))
    assert first.to_csv() == again.to_csv()
    assert over(first)["random", 0.1]["quality"] != over(other)["random", 0.1]["quality"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batch_number", [0, 6, 13])
def test_a_sweep_that_is_killed_goes_on(whole, model, tmp_path, batch_number):
    """At a batch; what was answered is not asked again, and the table is the same to the byte."""
    found, full, _ = whole

    def kill(loaded, items):
        if len(task.asked) == batch_number + 1:
            raise Killed

    task = Circles(kill)
    with pytest.raises(Killed):
        evaluate(task, model, **HOW, folder=tmp_path)
    assert dispatcher_of(model.model) is None
    again = Circles()
    assert evaluate(again, model, **HOW, folder=tmp_path).to_csv() == found.to_csv()
    assert len(again.asked) == len(full.asked) - batch_number and task.asked[:-1] + again.asked == full.asked


def test_a_journal_that_is_cut_anywhere_goes_on(model, tmp_path):
    """A kill while a line is written: inside each of them, at its end, and behind it."""
    how = {"methods": "random", "keep": 0.1, "repeats": 1, "batch": 2, "limit": 2, "baselines": False}
    found = evaluate(Circles(), model, **how, folder=tmp_path).to_csv()
    content = (tmp_path / "circles.jsonl").read_bytes()
    ends = [at for at, byte in enumerate(content) if byte == 10]
    assert len(ends) == 1 + 2 * (2 + 2)
    for cut in [0, *(end - back for end in ends for back in (20, 0, -1))]:
        (tmp_path / "circles.jsonl").write_bytes(content[:cut])
        assert evaluate(Circles(), model, **how, folder=tmp_path).to_csv() == found


def test_more_ways_use_the_answers_that_are_there(model, tmp_path):
    task = Circles()
    how = {"methods": "scope", "baselines": False, "folder": tmp_path}
    evaluate(task, model, **how, keep=0.5)
    before = len(task.asked)
    more = evaluate(task, model, **how, keep=[0.5, 0.25])
    assert len(task.asked) == before + 1
    assert more.to_csv() == evaluate(Circles(), model, methods="scope", baselines=False, keep=[0.5, 0.25]).to_csv()


def test_fewer_repeats_than_a_journal_holds(model, tmp_path):
    """The table has those that are asked for, though the last of the others was cut short."""
    how = {"methods": "random", "keep": 0.1, "baselines": False, "batch": 4}

    def kill(loaded, items):
        if len(task.asked) == 2 + 2 * 2 + 2:
            raise Killed

    task = Circles(kill)
    with pytest.raises(Killed):
        evaluate(task, model, **how, repeats=3, folder=tmp_path)
    found = evaluate(Circles(), model, **how, repeats=2, folder=tmp_path)
    assert found.to_csv() == evaluate(Circles(), model, **how, repeats=2).to_csv()
    assert over(found)["random", 0.1]["repeats"] == 2


@pytest.mark.parametrize(
    "change, said",
    [({"seed": 1}, "seed: 0 there, 1 now"), ({"batch": 2}, "batch: 8 there, 2 now"), ({"limit": 2}, "questions: ")],
)
def test_a_folder_with_another_sweep_is_refused(model, tmp_path, change, said):
    how = {"methods": [], "keep": 0.5, "baselines": False, "limit": 1, "folder": tmp_path}
    evaluate(Circles(), model, **how)
    content = (tmp_path / "circles.jsonl").read_bytes()
    task = Circles()
    with pytest.raises(ParameterError, match=f"answers of another sweep .*{said}"):
        evaluate(task, model, **{**how, **change})
    assert (tmp_path / "circles.jsonl").read_bytes() == content and not task.asked


def test_other_weights_are_another_sweep(model):
    before = fingerprint(model)
    weight = next(model.model.parameters())
    with torch.no_grad():
        first = weight.view(-1)[0].clone()
        weight.view(-1)[0] += 1
        assert fingerprint(model) != before
        weight.view(-1)[0] = first
    assert fingerprint(model) == before


# ---------------------------------------------------------------------- refusals
def carries(loaded, name):
    return any(name in str(method) for run in vlmtok.compression.carried(loaded.model) for method in run.methods)


def test_a_method_that_refuses_while_it_answers_has_a_row_that_says_so(model, tmp_path):
    def refuse(loaded, items):
        if carries(loaded, "todre") and len(task.asked) > 3:
            raise PassError("the third batch is too much")

    task = Circles(refuse)
    found = evaluate(task, model, ["todre", "scope"], 0.5, repeats=1, batch=4, baselines=False, folder=tmp_path)
    rows = over(found)
    assert rows["todre", 0.5]["problem"] == "the third batch is too much"
    assert all(rows["todre", 0.5][name] is None for name in ("quality", "difference", "low", "macs", "kv_bytes"))
    assert rows["scope", 0.5]["quality"] == 1 and dispatcher_of(model.model) is None
    assert "the third batch is too much" in found.to_markdown() and "refused, see below" in found.to_latex()
    mended = over(evaluate(Circles(), model, ["todre"], 0.5, repeats=1, batch=4, baselines=False, folder=tmp_path))
    assert mended["todre", 0.5]["quality"] == 1


@pytest.mark.internal_error
def test_a_fault_of_ours_goes_up(model):
    def refuse(loaded, items):
        if carries(loaded, "todre"):
            raise InternalError("KeyError", "'x'", "vlmtok.core.call:3")

    with pytest.raises(InternalError, match="KeyError"):
        evaluate(Circles(refuse), model, "todre", 0.5, baselines=False)
    assert dispatcher_of(model.model) is None


def test_a_model_that_refuses_the_task_itself_goes_up(model):
    def refuse(loaded, items):
        raise PassError("no pictures today")

    with pytest.raises(PassError, match="no pictures today"):
        evaluate(Circles(refuse), model, "todre", 0.5)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"keep": 0}, r"a budget of 0 is not possible; a share of the visual tokens in \(0, 1\)"),
        ({"keep": [0.5, 1.0]}, r"a budget of 1\.0"),
        ({"keep": 64}, r"a budget of 64"),
        ({"keep": True}, r"a budget of True"),
        ({"keep": ["0.5"]}, r"a budget of '0\.5'"),
        ({"keep": float("nan")}, r"a budget of nan"),
        ({"keep": []}, "no budget: keep is empty"),
        ({"limit": 0}, "limit=0 is not possible; a whole number of at least 1"),
        ({"repeats": 0}, "repeats=0"),
        ({"repeats": True}, "repeats=True"),
        ({"batch": 2.0}, r"batch=2\.0"),
        ({"seed": -1}, "seed=-1 is not possible; a whole number of at least 0"),
        ({"latency_rounds": -1}, "latency_rounds=-1"),
        ({"task": "scenes-vqqa"}, "no task 'scenes-vqqa'; did you mean 'scenes-vqa'"),
    ],
)
def test_bad_input_is_told_before_anything_is_asked(model, tmp_path, wrong, said):
    task = Circles()
    with pytest.raises(ParameterError, match=said):
        evaluate(**{"task": task, "model": model, "methods": "todre", "folder": tmp_path, **wrong})
    assert not task.asked and not task.probed and not list(tmp_path.iterdir())


def test_no_questions_and_a_model_that_is_compressed(model):
    none = Circles()
    none.items = lambda limit: []
    with pytest.raises(ParameterError, match="circles has no questions"):
        evaluate(none, model, "todre", 0.5)
    with vlmtok.compress(model.model, "todre"), pytest.raises(ParameterError, match="carries a compression"):
        evaluate(Circles(), model, "todre", 0.5)


def test_baselines_are_there_unless_switched_off_and_where_they_are_named(model):
    def names(**how):
        return [one["asked"] for one in over(evaluate(Circles(), model, keep=0.5, limit=1, repeats=1, **how)).values()]

    assert names(methods="scope") == ["none", "random", "downsample", "scope"]
    assert names(methods="scope", baselines=False) == ["none", "scope"]
    assert names(methods=["random", "scope"], baselines=False) == ["none", "random", "scope"]
    assert names(methods=[], as_written=["random", "tome:r=4"], baselines=False) == ["none", "random", "tome:r=4"]


def test_progress_is_told(model):
    told = []
    evaluate(Circles(), model, "scope", 0.5, batch=2, limit=4, baselines=False, progress=lambda *w: told.append(w))
    assert told[0] == ("loading tiny-llava", 0, 0)
    ways = ["none"] * 2 + ["scope:keep=0.5 @ 0.5"] * 2
    assert told[1:] == [(f"circles: {w} ({1 + (w != 'none')} of 2)", i % 2, 2) for i, w in enumerate(ways)]
