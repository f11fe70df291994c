"""`benchmarks/paper_table.py`: the committed page is what it writes, and every cell is what a result file holds."""

from __future__ import annotations

import json

import pytest
from support.places import ROOT
from support.scripts import script


@pytest.fixture(scope="module")
def tool():
    return script("benchmarks/paper_table.py")


def test_the_page_is_what_the_script_writes(tool):
    text, said = tool.page([tool.RESULTS])
    assert tool.PAGE.read_text("utf-8") == text, "python benchmarks/paper_table.py writes docs/paper-table.md anew"
    assert not said


def result(path, method, tokens, scores, date="20261127_100000", **config):
    """A file as lmms-eval writes it, as far as the script reads it."""
    figures = {"avg_visual_tokens": tokens, "avg_visual_tokens_bare": 576.0, "avg_macs": 1.5e12, "avg_kv_bytes": 2**26}
    asked = {"model": "vlmtok", "model_args": f"pretrained=llava-hf/llava-1.5-7b-hf,method={method}", "limit": None}
    rows = {
        task: {"alias": task, **{f"{name},none": value for name, value in row.items()}} for task, row in scores.items()
    }
    made = {
        "config": {**asked, **config},
        "date": date,
        "results": rows,
        "throughput": {**figures, "avg_pruner_time_share": 0.02},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made), "utf-8")


def cells(text, block, begins):
    """Cells of a row of the first table."""
    lines = text.partition(f"### {block}")[2].partition("###")[0].splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {begins}")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


FULL = {"gqa": {"exact_match": 0.6}, "mme": {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0}}


def test_cells_are_those_of_the_files(tool, tmp_path):
    result(tmp_path / "a" / "1_results.json", "none", 576.0, FULL)
    result(tmp_path / "b" / "1_results.json", "divprune:keep=0.111", 64.0, {"gqa": {"exact_match": 0.1}}, "20261127_1")
    half = {"gqa": {"exact_match": 0.3}, "mme": {"mme_perception_score": 1500.0, "mme_cognition_score": 120.0}}
    result(tmp_path / "b" / "2_results.json", "'divprune:keep=0.111'", 64.0, half, "20261127_2")
    result(tmp_path / "c" / "1_results.json", "tome:r=4+divprune:keep=64", 63.0, half)
    text, said = tool.page([tmp_path])
    assert said == []
    columns = [column.title for column in tool.MODELS[0].columns]
    gqa, mme = 1 + columns.index("GQA"), 1 + columns.index("MME")
    bare = cells(text, "All tokens", "none")
    assert (bare[gqa], bare[mme], bare[-1]) == ("60.0", "1800.0", "100.0 (2 of 9)")
    pruned = cells(text, "64 of 576", "DivPrune (CVPR 2025), divprune:keep=0.111")
    assert (pruned[gqa], pruned[mme]) == ("30.0", "1620.0"), "the later of two runs counts"
    assert pruned[-5:] == ["64", "1.50", "64", "2.0", "70.0 (2 of 9)"]
    assert pruned.count(tool.MISSING) == 7
    assert cells(text, "64 of 576", "tome:r=4+divprune:keep=64")[gqa] == "30.0"
    assert set(cells(text, "192 of 576", "DivPrune (CVPR 2025)")[1:]) == {tool.MISSING}
    assert set(cells(text, "64 of 576", "Random")[1:]) == {tool.MISSING}


def test_what_has_no_place_is_named(tool, tmp_path):
    result(tmp_path / "1_results.json", "divprune:keep=0.5", 288.0, FULL)
    result(tmp_path / "2_results.json", "divprune:keep=64", 64.0, FULL, limit=8.0)
    result(tmp_path / "3_results.json", "none", 576.0, FULL, model="llava_hf")
    result(tmp_path / "4_results.json", "none", 576.0, FULL, model_args="pretrained=tiny-llava,method=none")
    cached = tmp_path / "5_results.json"
    result(cached, "divprune:keep=64", 64.0, FULL)
    cached.write_text(json.dumps({**json.loads(cached.read_text()), "throughput": {}}))
    text, said = tool.page([tmp_path])
    assert text == tool.page([])[0]
    for words, one in zip(("--limit", "'llava_hf'", "no figures", "tiny-llava", "50.0%"), said, strict=True):
        assert words in one


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("pretrained=a/b,method=divprune:keep=0.1", "divprune:keep=0.1"),
        ("method=divprune:keep=0.1,pretrained=a/b,dtype=float16", "divprune:keep=0.1"),
        ("pretrained=a/b,method='averagepool:output_size=(4,6)',figures=true", "averagepool:output_size=(4,6)"),
        ("pretrained=a/b,method=tome:r=[4;4]+fastv:keep=0.5", "tome:r=[4;4]+fastv:keep=0.5"),
    ],
)
def test_arguments_are_read_as_lmms_eval_reads_them(tool, text, method):
    found = tool.arguments(text)
    assert found["pretrained"] == "a/b" and found["method"] == method


def test_every_model_has_rows_and_columns(tool):
    for model in tool.MODELS:
        rows = tool.rows_of(model)
        assert rows[0] == "random" and {"divprune", "visionzip", "fastv"} <= set(rows)
        assert len({column.task for column in model.columns}) == len(model.columns) >= 9
    towers = {"tome", "pitome", "tca"}
    assert towers <= set(tool.rows_of(tool.MODELS[0])) and not towers & set(tool.rows_of(tool.MODELS[1]))


def test_the_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert "paper-table.md" in text and "howto/lmms-eval.md" in text
