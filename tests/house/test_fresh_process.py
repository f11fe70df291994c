"""README's first command in a process of its own: its figures, which no version of a host may change.

The other tests share one process, in which a library has long been imported before vlmtok touches it.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlmtok
from vlmtok import loading
from vlmtok.lab import prompts

HOSTS = ("torch", "transformers", "timm", "open_clip_torch")
GRID, KEPT = 144, 14
"""Patches of the sample picture, and what todre:keep=0.1 leaves of them."""
MACS = {
    "vision": (206_882_304, 206_882_304),
    "projector": (4_718_592, 4_718_592),
    "prefill": (587_214_592, 76_033_792),
    "signals": (0, 39_168),
    "method": (0, 2_654_208),
}
"""Of each part, bare and compressed."""
CACHE_BYTES = (2_506_752, 376_832)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What ``python -m vlmtok run --json`` prints where nothing is imported yet and nothing but a CPU is seen."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    places = [str(Path(vlmtok.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, places)))
    environment.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    folder = tmp_path_factory.mktemp("fresh")
    command = [sys.executable, "-m", "vlmtok", "run", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["overlay.png"]
    return json.loads(done.stdout)


def test_the_libraries_are_those_of_this_session(printed):
    environment = printed["environment"]
    assert {name: environment[name] for name in HOSTS} == {name: importlib.metadata.version(name) for name in HOSTS}


def test_a_tenth_of_the_placeholders_stays(printed):
    model = loading.load(device="cpu")
    sample = loading.samples()[0]
    inputs = prompts.encode_prompt(model, loading.open_picture(sample.path), sample.question)
    placeholders = int((inputs["input_ids"] == model.model.config.image_token_id).sum())
    assert printed["bare"]["visual_tokens"] == placeholders == GRID
    short = printed["compressed"]
    assert short["visual_tokens"] == short["visual_tokens_last_layer"] == KEPT == round(0.1 * placeholders)


def test_macs(printed):
    report = printed["report"]
    assert {part: (row["before"], row["after"]) for part, row in report["macs"].items()} == MACS
    before, after = (sum(row[side] for row in MACS.values()) for side in (0, 1))
    assert (printed["bare"]["total_macs"], printed["compressed"]["total_macs"]) == (before, after)
    assert before / after > 2
    assert report["macs"]["prefill"]["share"] == MACS["prefill"][1] / MACS["prefill"][0]


def test_key_value_cache(printed):
    report = printed["report"]["cache_bytes"]
    assert (report["before"], report["after"]) == CACHE_BYTES
    assert (printed["bare"]["kv_bytes"], printed["compressed"]["kv_bytes"]) == CACHE_BYTES
    rows = 153, 153 - GRID + KEPT  # of a prompt, text included
    assert report["share"] == rows[1] / rows[0] == CACHE_BYTES[1] / CACHE_BYTES[0]


def test_the_answer_is_right_and_the_same(printed):
    assert printed["bare"]["answer"] == printed["compressed"]["answer"] == loading.samples()[0].answer
    assert printed["loyalty"]["same"] is True and printed["loyalty"]["divergence"] < 1e-3


def test_one_pass_with_the_picture_and_steps_behind_it(printed):
    steps = len(printed["bare"]["answer"].split())  # each word is a token, and the last step gives the end
    assert printed["report"]["passes"] == {"vision": 1, "decoder": 1, "decode steps": steps}
