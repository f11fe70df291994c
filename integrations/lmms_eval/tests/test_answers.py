"""Answers under lmms-eval are those of `vlmtok.compress` by hand, and the figures are those of its reports."""

from __future__ import annotations

import asking
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return asking.write(tmp_path_factory.mktemp("tasks"))


SPECS = {
    "none": "none",
    "divprune:keep=0.111": "divprune:keep=0.111",
    "todre:keep=16": "todre:keep=16",
    "tome:r=4+fastv:keep=0.5": "tome:r=4+fastv:keep=0.5",  # in the tower, and between layers
    "averagepool:output_size=(4,6)": "'averagepool:output_size=(4,6)'",
    "averagepool:output_size=(4;6)": "averagepool:output_size=(4;6)",
}


@pytest.mark.parametrize(
    ("spec", "batch"), [(spec, batch) for spec in SPECS for batch in (1, 3) if batch == 3 or "(" not in spec]
)
def test_answers_are_those_by_hand(folder, spec, batch):
    results = asking.evaluate(folder, ["vlmtok_pictures"], f"pretrained=tiny-llava,method={SPECS[spec]}", batch)
    answers, reports = asking.by_hand("vlmtok_pictures", spec, batch)
    assert asking.said(results, "vlmtok_pictures") == answers and all(answers)
    right = [row["exact_match"] for row in results["samples"]["vlmtok_pictures"]]
    assert results["results"]["vlmtok_pictures"]["exact_match,none"] == pytest.approx(sum(right) / 6)
    figures = results["throughput"]
    assert figures["avg_visual_tokens_bare"] == 144 and figures["avg_silent_share"] == 0
    if spec == "none":
        assert answers == ["top left", "orange", "blue cross", "5", "2", "star"]
        for name in ("visual_tokens", "macs", "kv_bytes"):
            assert figures[f"avg_{name}"] == figures[f"avg_{name}_bare"] > 0
        assert figures["avg_pruner_time_share"] == 0
        return
    lines = {
        "macs": [(report.macs.after.high, report.macs.before) for report, _ in reports],
        "kv_bytes": [(report.cache.after.high, report.cache.before) for report, _ in reports],
    }
    for name, pairs in lines.items():
        for key, side in ((f"avg_{name}", 0), (f"avg_{name}_bare", 1)):
            assert figures[key] == pytest.approx(sum(pair[side] for pair in pairs) / 6)
        assert figures[f"avg_{name}"] < figures[f"avg_{name}_bare"]
    layers = [[line.visual.high for line in r.layers if line.stage == "decoder"] for r, _ in reports]
    assert figures["avg_visual_tokens"] == pytest.approx(sum(map(sum, layers)) / sum(map(len, layers)))
    assert 0 < figures["avg_pruner_time_share"] < 1


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("spec", ["none", "divprune:keep=0.25"])
def test_several_pictures_earlier_turns_and_none_at_all(folder, spec, batch):
    """And two tasks in one run, whose documents are put in different ways; no batch has some of both."""
    arguments = f"pretrained={asking.FOLDER},method={spec}"
    results = asking.evaluate(folder, ["vlmtok_pictures", "talks"], arguments, batch)
    for task in ("vlmtok_pictures", "talks"):
        assert asking.said(results, task) == asking.by_hand(task, spec, batch)[0]
    figures = results["throughput"]
    assert figures["avg_vlmtok_pictures_visual_tokens_bare"] == 144
    assert 144 < figures["avg_talks_visual_tokens_bare"] < 288
    assert figures["avg_vlmtok_pictures_visual_tokens"] == (144 if spec == "none" else 36)


def test_a_bare_model_is_the_same_without_books(folder):
    arguments = "pretrained=tiny-llava,method=none"
    kept = asking.evaluate(folder, ["talks"], arguments, 4)
    none = asking.evaluate(folder, ["talks"], f"{arguments},figures=false", 4)
    assert asking.said(kept, "talks") == asking.said(none, "talks")
    assert "avg_macs" in kept["throughput"] and "avg_macs" not in none["throughput"]


def test_a_cache_of_responses_knows_methods_apart(folder, tmp_path):
    """The method is an argument of the model, which the cache is keyed by; it would answer for another otherwise."""
    given = {"use_cache": str(tmp_path / "cache")}
    found = {}
    for spec in ("none", "divprune:keep=0.111", "none"):
        results = asking.evaluate(folder, ["vlmtok_pictures"], f"pretrained=tiny-llava,method={spec}", 3, **given)
        found.setdefault(spec, []).append(asking.said(results, "vlmtok_pictures"))
        assert ("throughput" in results) == (
            len(found[spec]) == 1
        )  # the second time nothing runs, and nothing is counted
    assert found["none"][0] == found["none"][1] != found["divprune:keep=0.111"][0]


def test_other_arguments_do_what_they_say(folder):
    arguments = "pretrained=tiny-llava,method=divprune:keep=0.5,dtype=bfloat16,attn_implementation=eager"
    from vlmtok.harness.model import Vlmtok

    made = Vlmtok.create_from_arg_string(arguments, {"batch_size": "2", "device": "cpu", "max_batch_size": None})
    assert str(made._model.dtype) == "torch.bfloat16" and made.batch_size == 2 and str(made.device) == "cpu"
    assert made._model.config._attn_implementation == "eager"
    found = asking.evaluate(folder, ["vlmtok_pictures"], arguments, 2)
    assert asking.said(found, "vlmtok_pictures")[0] == "top left"


def test_a_batch_has_one_task_and_one_set_of_settings():
    """lmms-eval hands over all tasks at once; order within a task stays."""
    from types import SimpleNamespace

    from vlmtok.harness.model import batches

    rows = [("a", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 1), ("a", 1)]
    requests = [SimpleNamespace(args=("", None, {"max_new_tokens": n}, i, t, "test")) for i, (t, n) in enumerate(rows)]
    assert list(batches(requests, 2)) == [[0, 2], [5], [1, 4], [3]]
    assert list(batches(requests, 9)) == [[0, 2, 5], [1, 4], [3]] and list(batches([], 3)) == []
