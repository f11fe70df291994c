"""``vlmtok list --matrix``: families, or one checkpoint in a folder."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

import vlmtok
from vlmtok import cli
from vlmtok.lab.tiny import released


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as transformers saves it."""
    path = tmp_path_factory.mktemp("qwen")
    released.released("qwen2_5_vl").build().save_pretrained(path)
    return str(path)


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda *words: CliRunner().invoke(cli.app, ["list", *words])


def test_a_checkpoint_in_a_folder(listed, folder):
    result = listed("--matrix", "--model", folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["pairs"]] == vlmtok.list_methods() and found["of"] == len(
        vlmtok.list_methods()
    )
    by_name = {row["method"]: row for row in found["pairs"]}
    here = vlmtok.matrix(released.shared("qwen2_5_vl"))
    for one in here:
        row = by_name[one.method]
        assert (row["attaches"], tuple(row["stages"]), row["reason"], tuple(row["notes"])) == (
            one.attaches,
            one.stages,
            one.reason,
            one.notes,
        )
    assert by_name["fastv"]["model"] == folder and found["attaching"] == len(here.attaching)


def test_a_checkpoint_as_a_table_and_as_csv(listed, folder):
    text = listed("*e", "--matrix", "--model", folder).stdout
    flat = " ".join(text.replace("│", " ").split())
    assert "divprune" in flat and "projected" in flat and "pairs attach" in flat
    assert "fastv" not in flat
    rows = list(csv.DictReader(listed("fastv", "--matrix", "--model", folder, "--csv").stdout.splitlines()))
    assert [(row["method"], row["attaches"], row["stages"]) for row in rows] == [("fastv", "True", "decoder")]


def test_all_families(listed):
    result = listed("fastv", "--matrix")
    assert result.exit_code == 0, result.output
    words = result.stdout.split()
    assert {"llava", "qwen3_5", "blip-2", "D", "-"} <= set(words)
    assert "acts at stage 'decoder', which the model does not offer" in " ".join(words)


WRONG = {
    ("--model", "tiny-llava"): "--model goes with --matrix",
    ("--csv",): "--csv goes with --matrix",
    ("--matrix", "--models"): "one of --matrix, --models and --conventions",
    ("--matrix", "--conventions"): "one of --matrix",
    ("--matrix", "--json", "--csv"): "one of --json and --csv",
    ("--matrix", "--adapter", "generic-vlm"): "is of a model, and none is given",
    ("--matrix", "nothing*"): "no method matches",
    ("--matrix", "--model", "./nowhere"): "no such folder",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_does_not_go_together_is_one_line(listed, words):
    result = listed(*words)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert WRONG[words] in result.stderr
