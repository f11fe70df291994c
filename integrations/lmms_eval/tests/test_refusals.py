"""What cannot be run is refused before anything is loaded or answered, and no failure reads as an answer."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import asking
import pytest
import torch
from lmms_eval import models

from vlmtok import loading
from vlmtok.errors import ParameterError, PassError, SiteError, SpecError, UnknownMethod, UnsupportedModel
from vlmtok.harness.model import Vlmtok


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return asking.write(tmp_path_factory.mktemp("tasks"))


def test_the_id_is_listed():
    """A plug-in that fails to load is a warning there, and no more."""
    assert "vlmtok" in models.list_available_models()
    assert models.get_model("vlmtok") is Vlmtok
    done = command("models", limit=120)
    assert done.returncode == 0 and any(line.split() == ["vlmtok", "chat"] for line in done.stdout.splitlines())


REFUSED = [
    ("method=none", ParameterError, "pretrained= is missing"),
    ("pretrained=tiny-llava", ParameterError, "method= is missing.*none for the bare model"),
    ("pretrained=tiny-llava,method=divprun:keep=0.1", UnknownMethod, "did you mean 'divprune'"),
    ("pretrained=tiny-llava,method=divprune:kep=0.1", ParameterError, "kep"),
    ("pretrained=tiny-llava,method=divprune:keep", SpecError, "is no setting"),
    ("pretrained=tiny-llava,method=divprune:keep=7.5", ParameterError, "keep"),
    ("pretrained=tiny-llava,method=averagepool:output_size=(4,6)", ParameterError, "quote a method"),
    ("pretrained=tiny-llava,method=divprune:keep=0.1,keep=0.2", ParameterError, "there is no 'keep'"),
    ("pretrained=tiny-llava,method=fastv:K=40", (SiteError, ParameterError), "40"),
    ("pretrained=tiny-llava,method=none,figures=7", ParameterError, "figures=7"),
    ("pretrained=tiny-llava,method=none,batch_size=auto", ParameterError, "batch_size='auto'"),
    ("pretrained=/no/such/folder,method=divprune:keep=0.1", loading.LoadError, "no model"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=[row[0][-40:] for row in REFUSED])
def test_it_is_refused_before_weights_are_read(arguments, error, words, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("vlmtok.harness.model.load", loaded)
    with pytest.raises(error, match=words):
        Vlmtok.create_from_arg_string(arguments, {"batch_size": 1, "max_batch_size": None, "device": None})


def test_towers_and_processors_without_a_template_are_refused(monkeypatch):
    real = loading.load
    with pytest.raises(UnsupportedModel, match="is a vision tower"):
        monkeypatch.setattr("vlmtok.harness.model.load", lambda name, **_: real("timm:test_vit", random=True))
        Vlmtok(pretrained="x/y", method="none")
    bald = real("tiny-llava")
    bald.processor.chat_template = None
    monkeypatch.setattr("vlmtok.harness.model.load", lambda name, **_: bald)
    with pytest.raises(UnsupportedModel, match="no chat template"):
        Vlmtok(pretrained="x/y", method="none")


# ---------------------------------------------------------------------- while it runs
def broken(folder, monkeypatch, generate, method="divprune:keep=0.25"):
    """A run whose model generates as it is told."""
    real = Vlmtok._attached

    def attached(self):
        self._model.generate = lambda **inputs: generate(self, inputs)
        return real(self)

    monkeypatch.setattr(Vlmtok, "_attached", attached)
    return asking.evaluate(folder, ["vlmtok_pictures"], f"pretrained=tiny-llava,method={method}", 3)


def test_a_failure_is_raised_and_not_scored(folder, monkeypatch):
    def fails(self, inputs):
        raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        broken(folder, monkeypatch, fails)


def test_a_refusal_of_the_method_is_raised(folder):
    with pytest.raises(ParameterError, match="output_size"):
        asking.evaluate(folder, ["vlmtok_pictures"], "pretrained=tiny-llava,method=averagepool:output_size=(13;13)", 3)


def test_no_token_at_all_is_a_failure(folder, monkeypatch):
    with pytest.raises(PassError, match=r"generate gave 3 answers to 3 requests, of \[0, 0, 0\] tokens"):
        broken(folder, monkeypatch, lambda self, inputs: inputs["input_ids"], "none")


def test_an_answer_that_ends_at_once_is_one(folder, monkeypatch):
    """The model was asked and said nothing: that is scored, and shown."""

    def silent(self, inputs):
        ids = inputs["input_ids"]
        return torch.cat([ids, torch.full((len(ids), 1), 2)], 1)

    results = broken(folder, monkeypatch, silent, "none,figures=false")
    assert asking.said(results, "vlmtok_pictures") == [""] * 6
    assert results["throughput"]["avg_silent_share"] == 1
    assert results["results"]["vlmtok_pictures"]["exact_match,none"] == 0


def test_a_method_that_looks_on_is_refused(folder, monkeypatch):
    """It would score like the bare model."""

    def paused(self, inputs):
        with self.run.paused():
            return type(self._model).generate(self._model, **inputs)

    with pytest.raises(PassError, match="did nothing to a prompt with pictures"):
        broken(folder, monkeypatch, paused)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_clips_and_sounds_are_refused(folder, kind, monkeypatch):
    model = Vlmtok(pretrained="tiny-llava", method="none")
    model.task_dict = {"clips": {"test": [{}]}}
    messages = [{"role": "user", "content": [{"type": kind, "url": "x.mp4"}, {"type": "text", "text": "?"}]}]
    request = type("Request", (), {"args": ("", lambda doc: messages, {}, 0, "clips", "test")})
    with pytest.raises(ParameterError, match="takes pictures"):
        model.generate_until([request])
    with pytest.raises(ParameterError, match="likelihoods"):
        model.loglikelihood([request])
    with pytest.raises(ParameterError, match="one turn"):
        model.generate_until_multi_round([request])


# ---------------------------------------------------------------------- the command
def command(*words, limit=300):
    """lmms-eval's command, as a process."""
    return subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words]
        if words[0].startswith("-")
        else [sys.executable, "-c", "from lmms_eval.cli.dispatch import main; main()", *words],
        capture_output=True,
        text=True,
        timeout=limit,
    )


def table():
    """The script that makes the papers' table of such files."""
    path = Path(__file__).parents[3] / "benchmarks" / "paper_table.py"
    spec = importlib.util.spec_from_file_location("paper_table", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_answers_and_figures(folder, tmp_path):
    out = tmp_path / "out"
    arguments = "pretrained=tiny-llava,method=todre:keep=16"
    words = ("eval", "--model", "vlmtok", "--model_args", arguments, "--tasks", "vlmtok_pictures")
    done = command(
        *words, "--include_path", str(folder), "--batch_size", "3", "--log_samples", "--output_path", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = out.rglob("*_results.json")
    results = json.loads(written.read_text("utf-8"))
    assert results["config"]["model"] == "vlmtok" and results["config"]["model_args"] == arguments
    assert results["throughput"]["avg_visual_tokens"] == 16 and results["throughput"]["avg_kv_bytes"] > 0
    run = table().read(written)
    assert run.checkpoint == "tiny-llava" and run.method == "todre:keep=16" and run.share == 16 / 144
    assert set(run.scores) == {"vlmtok_pictures"} and 0 < run.scores["vlmtok_pictures"]["exact_match"] <= 1
    (samples,) = out.rglob("*_samples_vlmtok_pictures.jsonl")
    rows = sorted(map(json.loads, samples.read_text("utf-8").splitlines()), key=lambda row: row["doc_id"])
    assert [row["filtered_resps"] for row in rows] == asking.by_hand("vlmtok_pictures", "todre:keep=16", 3)[0]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("divprun:keep=0.1", "vlmtok: UnknownMethod: "),  # before it loads
        ("averagepool:output_size=(13;13)", "vlmtok: ParameterError: "),  # when it is asked
    ],
)
def test_the_command_fails_where_a_method_does(folder, tmp_path, method, words):
    """lmms-eval catches every `Exception` there, and would end with 0 and no results."""
    done = command(
        *("--model", "vlmtok", "--model_args", f"pretrained=tiny-llava,method={method}", "--tasks", "vlmtok_pictures"),
        *("--include_path", str(folder), "--output_path", str(tmp_path / "out")),
    )
    assert done.returncode == 1 and words in done.stderr, done.stdout + done.stderr
    assert not list(tmp_path.rglob("*_results.json"))
