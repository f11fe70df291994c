"""``vlmtok eval``: what it lists, refuses, writes, and says when it is stopped."""

import csv
import json
import os

import pytest
from PIL import Image
from support.circles import Circles
from typer.testing import CliRunner

from vlmtok import cli
from vlmtok.errors import MissingPackage
from vlmtok.evaluation import engine, plot, task

pytestmark = pytest.mark.filterwarnings("ignore:the hooks of")
HOW = ("--methods", "scope", "--keep", "0.5", "--limit", 2, "--repeats", 1, "--device", "cpu")


@pytest.fixture
def asked(monkeypatch):
    """The task of circles among the others; gives those that were made."""
    made = []

    def named(name, **settings):
        if name != "circles":
            return task_named(name, **settings)
        made.append(Circles(**settings))
        return made[-1]

    task_named = task.task_named
    monkeypatch.setattr(task, "task_named", named)
    return made


@pytest.fixture
def vlmtok_(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    return lambda *words: CliRunner().invoke(cli.app, ["eval", *(str(word) for word in words)])


def test_the_list(vlmtok_, tmp_path):
    result = vlmtok_("--list")
    assert result.exit_code == 0 and not list(tmp_path.iterdir())
    for name in task.TASKS:
        assert f"│ {name} " in result.stdout and task.task_named(name).about[:30] in result.stdout
    assert "scenes-llava" in result.stdout and "tiny-llava" in result.stdout


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ([], "vlmtok eval needs a task; --list shows them"),
        (["scenes-vqaa"], "no task 'scenes-vqaa'; did you mean 'scenes-vqa'"),
        (["circles", "--methods", "todre,tomee"], "no method 'tomee'; did you mean 'tome'?"),
        (["circles", "--methods", "fastv:keeep=0.5"], "fastv has no parameter 'keeep'"),
        (["circles", "--as-written", "nosuch"], "no method 'nosuch'"),
        (["circles", "--keep", "half"], "--keep 'half' is no share of the visual tokens, such as 0.25"),
        (["circles", "--keep", "0.5,1.5"], "a budget of 1.5 is not possible; a share of the visual tokens in (0, 1)"),
        (["circles", "--keep", ","], "there is no budget"),
        (["circles", "--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        (["circles", "--repeats", "many"], "'--repeats': Input should be a valid integer"),
        (["circles", "--keep", "0.5", "--keep", "0.1"], "--keep"),
        (["scenes-vqa", "--images", "nowhere"], "task scenes-vqa: "),
        (["fidelity", "--images", "nowhere"], "there is no folder 'nowhere'"),
        (["circles", "--model", "nosuch-model"], "nosuch-model"),
        (["circles", "--device", "abacus"], "abacus"),
    ],
)
def test_what_is_wrong_costs_a_line(vlmtok_, asked, tmp_path, typed, says):
    result = vlmtok_(*typed)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("vlmtok: "), result.output
    assert says in lines[0] and not result.stdout
    assert not any(one.asked for one in asked) and not list(tmp_path.iterdir())


def test_it_writes_its_files_and_says_so(vlmtok_, tmp_path):
    result = vlmtok_("circles", *HOW, "--out", "new/folder")
    assert result.exit_code == 0, result.output
    names = ["circles.csv", "circles.jsonl", "circles.md", "circles.tex"]
    names += [f"circles-{cost}.png" for cost in plot.AXES if cost != "latency_ratio"]
    assert sorted(os.listdir("new/folder")) == sorted(names)
    for name in names:
        said = f"written  {os.path.join('new', 'folder', name)}"
        assert (said in result.stdout) == (not name.endswith("jsonl"))
    assert Image.open("new/folder/circles-macs.png").width > 1000
    with open("new/folder/circles.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["asked"] for row in rows} == {"none", "random", "downsample", "scope"}
    with open("new/folder/circles.md", encoding="utf-8") as file:
        assert "| scope | 0.5 |" in file.read()
    assert "difference" in result.stdout and "circles on tiny-llava, 2 questions" in result.stdout


def test_options_reach_the_sweep(vlmtok_, asked, tmp_path, monkeypatch):
    seen = {}

    def run(*given, **how):
        seen.update(how, given=given[1:])
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "evaluate", run)
    words = ("--methods", "todre,fastv:keep=0.1,0.5", "--keep", "0.5, 0.1", "--limit", 7, "--repeats", 4, "--seed", 5)
    more = ("--batch", 6, "--no-baselines", "--as-written", "tome:r=4,scope", "--latency", 3, "--out", "there")
    vlmtok_("circles", "--model", "m", *words, *more, "--device", "cpu", "--dtype", "float16")
    assert seen.pop("progress") and str(seen.pop("folder")) == "there"
    assert seen == {
        "given": ("m", ["todre", "fastv:keep=0.1,0.5"], [0.5, 0.1]),
        "limit": 7,
        "repeats": 4,
        "seed": 5,
        "batch": 6,
        "baselines": False,
        "as_written": ["tome:r=4", "scope"],
        "latency_rounds": 3,
        "device": "cpu",
        "dtype": "float16",
    }


@pytest.mark.parametrize("out", ["taken", "taken/below/it"])
def test_a_folder_that_is_a_file(vlmtok_, asked, tmp_path, out):
    (tmp_path / "taken").write_text("mine")
    result = vlmtok_("circles", *HOW, "--no-baselines", "--out", out)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and "cannot hold the journal" in lines[0]
    assert not asked[0].asked
    assert (tmp_path / "taken").read_text() == "mine"


def test_json(vlmtok_):
    result = vlmtok_("circles", *HOW, "--no-baselines", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["asked"], row["kind"]) for row in found["rows"]] == [
        (name, kind) for name in ("none", "scope") for kind in ("left", "right", "all")
    ]
    assert found["rows"][0]["quality"] == 1 and found["rows"][0]["difference"] is None
    assert os.path.join("eval", "circles.csv") in found["files"] and all(map(os.path.exists, found["files"]))


def test_stopped_and_started_again(vlmtok_, asked, monkeypatch):
    """Ctrl-C in the middle: 130, how to go on, and the same command asks only what is left."""
    plain = Circles.answer

    def stopped(self, loaded, items):
        if len(self.asked) == 3:
            raise KeyboardInterrupt
        return plain(self, loaded, items)

    words = ("circles", *HOW, "--batch", 1)
    monkeypatch.setattr(Circles, "answer", stopped)
    result = vlmtok_(*words)
    assert result.exit_code == 130 and not result.stdout
    assert result.stderr == "vlmtok: stopped; the same command goes on from eval/circles.jsonl\n"
    assert os.listdir("eval") == ["circles.jsonl"]
    monkeypatch.setattr(Circles, "answer", plain)
    assert vlmtok_(*words).exit_code == 0
    assert len(asked[0].asked) == 3 and len(asked[1].asked) == 2 * 4 - 3
    with open("eval/circles.csv", encoding="utf-8") as file:
        again = file.read()
    assert vlmtok_(*words, "--out", "fresh").exit_code == 0
    with open("fresh/circles.csv", encoding="utf-8") as file:
        assert file.read() == again
    result = vlmtok_(*words, "--seed", 1)
    assert result.exit_code == 2 and "seed: 0 there, 1 now" in result.stderr


def test_without_matplotlib_there_is_no_plot(vlmtok_, monkeypatch):
    def missing(*given):
        raise MissingPackage("plot()", "matplotlib")

    monkeypatch.setattr(plot, "quality_plot", missing)
    result = vlmtok_("circles", *HOW, "--no-baselines")
    assert result.exit_code == 0 and sorted(os.listdir("eval")) == [
        f"circles.{e}" for e in ("csv", "jsonl", "md", "tex")
    ]
    assert "vlmtok: note: no plots are drawn: " in result.stderr and "matplotlib" in result.stderr
