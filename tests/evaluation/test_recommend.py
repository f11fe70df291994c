"""`recommend` on results written here: whom it names, whom never, and what it says of random choice."""

from __future__ import annotations

import csv
import json
import math

import pytest
from typer.testing import CliRunner

import vlmtok
from vlmtok import cli
from vlmtok.errors import ParameterError
from vlmtok.evaluation import results as stored
from vlmtok.evaluation.recommend import TASKS, pooled
from vlmtok.evaluation.results import NEEDED, Measured
from vlmtok.evaluation.ways import CONVENTION, IN_CACHES
from vlmtok.lab.tiny import released
from vlmtok.lab.tiny.families import shared
from vlmtok.loading import LoadError, load, names

OCR = TASKS["ocr"].kinds
QUALITY = {"none": 0.9, "divprune": 0.8, "fastv": 0.78, "todre": 0.75, "scope": 0.5, "random": 0.6, "downsample": 0.55}
KEEP = {"divprune": "keep", "fastv": "keep", "todre": "keep", "scope": "keep", "random": "keep"}


def row(method, quality, kind="all", keep=0.25, task="scenes-vqa", model="scenes-llava", half=0.04, **more):
    bare = method == "none"
    return {
        "task": task,
        "model": model,
        "method": method,
        "spec": f"{method}:keep={keep}" if method in KEEP else method,
        "keep": 1.0 if bare else keep,
        "kind": kind,
        "questions": 100,
        "quality": quality,
        "difference": "" if bare else round(quality - 0.9, 4),
        "low": "" if bare else round(quality - 0.9 - half, 4),
        "high": "" if bare else round(quality - 0.9 + half, 4),
        "visual_tokens": 576 * (1 if bare else keep),
        "macs_ratio": 1 if bare else 2.5,
        "problem": "",
        "device": "cpu",
        **more,
    }


def table(keeps=(0.1, 0.25, 0.5), quality=QUALITY, **more):
    kinds = ("all", *OCR, "where", "second turn")
    return [row(name, q, kind, keep, **more) for name, q in quality.items() for keep in keeps for kind in kinds]


@pytest.fixture
def write(tmp_path):
    def made(rows, name="results.csv"):
        path = tmp_path / name
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for one in rows for key in one)))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return made


# ---------------------------------------------------------------------- whom it names
def test_settings_chosen_for_the_measured_model_are_for_that_model_alone(write):
    better = [{**one, "method": "divprune", "spec": "divprune:keep=0.2", "asked": "divprune:sim=other", "quality": 0.95}
              for one in table(quality={"todre": 0.95})]  # fmt: skip
    path = write([{**one, "asked": one["method"]} for one in table()] + better)
    other = vlmtok.recommend(None, 0.25, "chat", results=path)
    assert "0.95" not in str(other.picks[0].quality) and other.picks[0].rows[0].asked == "divprune"
    assert any("divprune:sim=other" in note and "chosen for scenes-llava" in note for note in other.notes)
    own = vlmtok.recommend("scenes-llava", 0.25, "chat", results=path)
    assert own.picks[0].rows[0].asked == "divprune:sim=other"
    assert not any("chosen for" in note for note in own.notes)


def test_methods_of_caches_are_named_and_not_ranked(write):
    """At equal shares they would always be first: their prompt has seen all tokens, for all its MACs."""
    caches = [{**one, "convention": IN_CACHES} for one in table(quality={"cdpruner": 0.99})]
    found = vlmtok.recommend(None, 0.25, "chat", results=write(table() + caches))
    assert "cdpruner" not in [one.method for one in (*found.picks, *found.baselines)]
    (note,) = [note for note in found.notes if "cdpruner" in note]
    assert "kv_bytes" in note and "no MACs of the prompt" in note
    tokens = [{**one, "convention": CONVENTION} for one in table(quality={"cdpruner": 0.99})]
    assert vlmtok.recommend(None, 0.25, "chat", results=write(table() + tokens)).picks[0].method == "cdpruner"


def test_the_best_come_first_with_their_rows(write):
    found = vlmtok.recommend(None, 0.25, "chat", results=write(table()))
    assert [one.spec for one in found.picks] == [
        "divprune:keep=0.25",
        "fastv:keep=0.25",
    ]  # todre lies below the best one's interval
    best = found.picks[0]
    assert (best.quality, best.difference, best.low, best.high) == (0.8, -0.1, -0.14, -0.06)
    assert [(one.kind, one.keep) for one in best.rows] == [("all", 0.25), ("where", 0.25), ("second turn", 0.25)]
    assert best.where == ("projected",) and found.picks[1].where == ("decoder",)
    assert "-0.100 [-0.140, -0.060]" in best.reason and "MACs 1 / 2.5" in best.reason
    assert {one.method for one in found.baselines} == {"random", "downsample"}
    assert "beats random and downsample" in found.verdict


def test_a_third_within_the_interval_is_named(write):
    found = vlmtok.recommend(None, 0.25, results=write(table(quality={**QUALITY, "todre": 0.77})))
    assert [one.method for one in found.picks] == ["divprune", "fastv", "todre"] and found.task == "chat"


def test_kinds_decide_by_task(write):
    """FastV reads best, and is not best over all questions."""
    rows = [one for one in table() if not (one["method"] == "fastv" and one["kind"] in OCR)]
    rows += [row("fastv", 0.88, kind) for kind in OCR]
    path = write(rows)
    assert vlmtok.recommend(None, 0.25, "chat", results=path).picks[0].method == "divprune"
    found = vlmtok.recommend(None, 0.25, "ocr", results=path)
    assert found.picks[0].method == "fastv" and found.kinds == OCR
    assert [one.kind for one in found.picks[0].rows] == list(OCR)
    assert any("whose questions differ" in note for note in found.notes)


def test_intervals_of_kinds_add_as_squares():
    rows = [
        Measured("t", "m", "x", "x", 0.25, kind, count, q, q - 0.9, q - 0.9 - half, q - 0.9 + half)
        for kind, count, q, half in (("number", 100, 0.8, 0.06), ("chart", 300, 0.4, 0.08))
    ]
    quality, difference, low, high = pooled(rows)
    assert quality == pytest.approx(0.25 * 0.8 + 0.75 * 0.4) and difference == pytest.approx(quality - 0.9)
    half = math.hypot(0.25 * 0.06, 0.75 * 0.08)
    assert (low, high) == (pytest.approx(difference - half), pytest.approx(difference + half))


def test_random_within_the_interval_is_said(write):
    found = vlmtok.recommend(None, 0.25, results=write(table(quality={**QUALITY, "random": 0.77, "downsample": 0.85})))
    assert found.verdict.startswith("no method beats downsample or random here")
    assert "downsample got more right" in found.verdict and str(found).count("no method beats") == 1


def test_without_baselines_it_says_so(write):
    rows = [one for one in table() if one["method"] not in ("random", "downsample")]
    found = vlmtok.recommend(None, 0.25, results=write(rows))
    assert "nothing says that a method is needed" in found.verdict
    assert any(note.startswith("random was not measured") for note in found.notes)


# ---------------------------------------------------------------------- budgets
@pytest.mark.parametrize(
    "asked, taken", [(0.25, 0.25), (0.2, 0.25), (0.12, 0.1), (0.36, 0.5), (0.9, 0.5), (36, 0.25), (14, 0.1)]
)
def test_the_nearest_measured_budget_counts(write, asked, taken):
    """Numbers are of the model's own tokens: tiny-llava makes 144 of a picture."""
    found = vlmtok.recommend(None, asked, results=write(table()))
    assert found.measured == taken and all(row.keep == taken for one in found.picks for row in one.rows)
    share = asked if isinstance(asked, float) else asked / 144
    said = [note for note in found.notes if "was not measured: all figures are those of" in note]
    assert bool(said) == (share != taken)


def test_numbers_need_a_model_that_says_how_many(write):
    with pytest.raises(ParameterError, match="depends on its size; give a share"):
        vlmtok.recommend(shared("qwen2_5_vl"), 64, results=write(table()))
    assert vlmtok.recommend("llava-1.5-7b", 64, results=write(table())).measured == 0.1


def test_settings_are_those_that_meet_the_budget_on_this_model(write):
    """FastV's first layers keep all: with more layers it may keep more of the picture behind them."""
    path = write(table())
    small, large = vlmtok.recommend(None, 0.25, results=path), vlmtok.recommend("llava-1.5-7b", 0.2, results=path)
    for found, model in ((small, "tiny-llava"), (large, "llava-1.5-7b")):
        assert len(found.methods) == 2 and found.methods == [one.here for one in found.picks]
        for spec in found.methods:
            made = vlmtok.estimate(model, spec)
            lines = made.last_layers()
            reached = sum(line.visual.high for line in lines) / len(lines)
            assert reached == pytest.approx(found.asked * (144 if model == "tiny-llava" else 576), rel=0.08)
    assert small.methods[1] != large.methods[1] and small.methods[1] in str(small)
    unknown = vlmtok.recommend(shared("qwen2_5_vl"), 0.25, results=path)
    assert unknown.methods[0] == unknown.picks[0].spec and not unknown.picks[0].here
    assert any("layer_average_tokens=0.25, image_size" in note for note in unknown.notes)
    assert not any("image_size" in note for note in small.notes)


def test_budgets_of_single_ways_are_none(write):
    """A stack ran as it was written, at a share of its own that nothing else was measured at."""
    stack = row("tome+fastv", 0.99, keep=0.31, spec="tome:r=1+fastv:keep=0.2")
    rows = [*table(), stack]
    found = vlmtok.recommend(None, 0.31, results=write(rows))
    assert found.measured == 0.25 and "tome" not in str(found.methods)
    found = vlmtok.recommend(None, 0.25, results=write([*table(), {**stack, "keep": 0.25}]))
    assert found.picks[0].spec == "tome:r=1+fastv:keep=0.2" and found.picks[0].where == ("vision", "decoder")


# ---------------------------------------------------------------------- whom it never names
def test_methods_that_cannot_meet_the_budget_are_not_named(write):
    """On 16 layers FastV keeps 13 % of the tokens on average, whatever it does behind its first two."""
    found = vlmtok.recommend(None, 0.1, results=write(table()))
    assert [one.method for one in found.picks] == ["divprune", "todre"]
    assert "the nearest is 18.9 tokens" in found.refused["fastv:keep=0.1"]


def test_refused_methods_are_never_named(write):
    """The best ones of the table are among them."""
    rows = [*table(quality={**QUALITY, "fastv": 0.89}), row("tca", 0.91), row("scope", 0.895)]
    model = released.shared("idefics2")
    path = write([{**one, "spec": one["spec"] if one["method"] in KEEP else one["method"]} for one in rows])
    found = vlmtok.recommend(model, 0.25, results=path)
    specs = sorted({one["spec"] for one in rows if one["keep"] == 0.25 and one["method"] != "downsample"})
    here = {one.method: one.attaches for one in vlmtok.matrix(model, specs)}
    assert set(found.refused) == {spec for spec, attaches in here.items() if not attaches} | {"downsample"}
    assert "tca" in found.refused and found.methods[0] == "fastv:keep=0.25"
    assert all(here[spec] and spec not in found.refused for spec in found.methods)
    assert all(found.refused.values())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "blip-2", "llama4"])
def test_picks_run_on_the_model(write, family):
    """Each can be attached; a family that none fits says so."""
    rows = [row(name, 0.5 + 0.01 * n) for n, name in enumerate(vlmtok.list_methods())]
    rows = [{**one, "spec": str(_usual(one["method"]))} for one in rows] + [row("downsample", 0.3)]
    model = released.shared(family)
    try:
        found = vlmtok.recommend(model, 0.25, results=write(rows))
    except ParameterError as refused:
        assert "takes none of the methods" in str(refused)
        assert not [
            one
            for one in vlmtok.matrix(model, [row["spec"] for row in rows[:-1]]).attaching
            if one.method not in ("random",)
        ]
        return
    for spec in found.methods:
        vlmtok.compress(model, spec)._end(quiet=True)
    assert ("downsample" in found.refused) == (family in ("gemma3", "blip-2"))


def _usual(name):
    from vlmtok.lab.pairs import everyday

    return everyday(name)


def test_a_spec_that_the_model_refuses_though_the_method_runs(write):
    """Layer 30 is there in the measured model, and not in this one."""
    rows = [*table(), row("fastv", 0.95, spec="fastv:K=30")]
    found = vlmtok.recommend(None, 0.25, results=write(rows))
    assert "fastv:K=30" in found.refused and found.picks[1].spec == "fastv:keep=0.25"


def test_settings_by_layer_of_another_depth_are_set_anew(write):
    """The measured tower has eight layers, this one six."""
    more = row("tome", 0.85, spec="tome:r=[62;62;62;62;62;61;61;61]", asked="tome")
    found = vlmtok.recommend(None, 0.25, results=write([*table(), more]))
    assert found.picks[0].method == "tome" and found.methods[0].startswith("tome:r=")
    vlmtok.compress(load(device="cpu").model, found.methods[0])._end(quiet=True)


def test_ways_with_a_problem_are_left_out(write):
    """And named below: there are no figures of them."""
    broken = {**row("todre", 0.99), "quality": "", "difference": "", "low": "", "high": "", "problem": "no signal"}
    rows = [row("none", 0.9), row("divprune", 0.8), broken]
    found = vlmtok.recommend(None, 0.25, results=write(rows))
    assert found.methods == ["divprune:keep=0.25"]
    assert "no figures of todre:keep=0.25: no signal" in found.notes


# ---------------------------------------------------------------------- models and tasks
def test_towers_are_for_classification(write):
    rows = [
        row(name, quality, task="scenes-clip", model="scenes-clip")
        for name, quality in (("none", 0.9), ("tome", 0.85), ("pitome", 0.8), ("random", 0.5), ("downsample", 0.6))
    ]
    path = write(
        [
            {**one, "spec": {"tome": "tome:r=2", "pitome": "pitome:ratio=0.9"}.get(one["method"], one["spec"])}
            for one in rows
        ]
    )
    found = vlmtok.recommend("vit-b-16", 0.25, results=path)
    assert found.task == "classification" and [one.spec for one in found.picks] == ["tome:r=2", "pitome:ratio=0.9"]
    assert [one.method for one in found.baselines] == ["downsample", "random"]
    with pytest.raises(ParameterError, match="task='ocr' is nothing that vit-b-16 does"):
        vlmtok.recommend("vit-b-16", 0.25, "ocr", results=path)
    with pytest.raises(ParameterError, match="classification.* is nothing that tiny-llava does"):
        vlmtok.recommend(None, 0.25, "classification", results=path)
    with pytest.raises(ParameterError, match="no figures of scenes-vqa .tasks in them: scenes-clip"):
        vlmtok.recommend(None, 0.25, results=path)


def test_the_model_itself_counts_before_others(write):
    mine = table(quality={**QUALITY, "scope": 0.89}, model="tiny-llava")
    path = write([*table(), *mine])
    assert vlmtok.recommend(None, 0.25, results=path).source == "tiny-llava"
    assert vlmtok.recommend(load(device="cpu"), 0.25, results=path).picks[0].method == "scope"
    other = vlmtok.recommend("llava-1.5-7b", 0.25, results=path)
    assert other.source == "scenes-llava" and other.picks[0].method == "divprune"


# ---------------------------------------------------------------------- files
def test_results_that_ship_are_read(write, monkeypatch, tmp_path):
    monkeypatch.setattr(stored, "DATA", tmp_path)
    with pytest.raises(LoadError, match="ships no results"):
        vlmtok.recommend(None, 0.25)
    (tmp_path / "results").mkdir()
    write(table()).rename(tmp_path / "results" / "scenes.csv")
    assert vlmtok.recommend(None, 0.25).picks[0].method == "divprune"
    assert names.DATA.name == "data"


def test_files_that_are_no_results(write, tmp_path):
    with pytest.raises(LoadError, match="no such file"):
        vlmtok.recommend(None, 0.25, results=tmp_path / "nowhere.csv")
    with pytest.raises(ParameterError, match="no column task, model"):
        vlmtok.recommend(None, 0.25, results=write([{"a": 1}]))
    with pytest.raises(ParameterError, match="line 2: quality is 'much'"):
        vlmtok.recommend(None, 0.25, results=write([{**row("divprune", 0.5), "quality": "much"}], "b.csv"))
    with pytest.raises(ParameterError, match="line 2: there is no low"):
        vlmtok.recommend(None, 0.25, results=write([row("divprune", 0.5, low="")], "c.csv"))
    assert set(NEEDED) <= set(row("none", 1.0))


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -1, True, "much"])
def test_budgets_that_are_none(write, budget):
    with pytest.raises(ParameterError, match="recommend: budget="):
        vlmtok.recommend(None, budget, results=write(table()))


def test_tasks_that_are_none(write):
    with pytest.raises(ParameterError, match="none of ocr, chat, classification"):
        vlmtok.recommend(None, 0.25, "video", results=write(table()))


# ---------------------------------------------------------------------- the command
@pytest.fixture
def typed(monkeypatch, write):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = str(write(table()))
    return lambda *words: CliRunner().invoke(cli.app, ["recommend", "--results", path, *words])


def test_the_command(typed):
    result = typed("--budget", "0.2", "--task", "ocr")
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "for ocr on tiny-llava at 0.2 of the visual tokens: measured at 0.25 on scenes-llava" in flat
    assert "divprune:keep=0.25" in flat and "fine print" in flat and "0.2 was not measured" in flat
    found = json.loads(typed("--budget", "36", "--json").stdout)
    assert found["picks"][0]["method"] == "divprune" and found["asked"] == 0.25 and found["picks"][0]["reason"]


@pytest.mark.parametrize(
    "words, said",
    [
        (("--budget", "much"), "--budget 'much': a share such as 0.25"),
        (("--budget", "2.5"), "--budget 2.5 is not possible"),
        (("--task", "video"), "--task 'video' is none of ocr, chat, classification"),
        (("--model", "./nowhere"), "no such folder"),
    ],
)
def test_wrong_words_are_one_line(typed, words, said):
    result = typed(*words)
    assert result.exit_code == 2 and result.stdout == "" and said in result.stderr and result.stderr.count("\n") == 1
