"""The command line: what it prints, what it refuses, and that a wrong word costs one line and exit code 2."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.checkpoints import llava, llava_next, picture, vit
from support.page import read
from support.places import ROOT
from typer.testing import CliRunner

import vlmtok
from vlmtok import cli, loading
from vlmtok.core.registry import list_methods, method_class
from vlmtok.forecast.estimate import estimate
from vlmtok.lab import catalogue, suite_modelled, suite_models
from vlmtok.lab import compare as comparing

QUESTION = "what color is the circle ?"


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """What stands for the package's data: a random checkpoint of the same layout, and a picture."""
    data = tmp_path_factory.mktemp("data")
    llava(data / loading.EMBEDDED)
    (data / "pictures").mkdir()
    picture().save(data / "pictures" / "shapes.png")
    row = {"picture": "shapes.png", "question": QUESTION, "answer": "red"}
    (data / "pictures" / "questions.json").write_text(json.dumps([row]))
    return data


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    return str(vit(tmp_path_factory.mktemp("vit")))


@pytest.fixture
def vlmtok_(package, tmp_path, monkeypatch):
    """Runs the command in an empty folder; gives what it printed and its exit code."""
    monkeypatch.setattr(loading.names, "DATA", package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*words):
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    return call


def data_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ---------------------------------------------------------------------- run
def test_run_alone_compares_the_embedded_checkpoint(vlmtok_, tmp_path):
    result = vlmtok_("run", "--max-new-tokens", 3, "--rounds", 1)
    assert result.exit_code == 0, result.output
    for word in (
        "tiny-llava",
        QUESTION,
        comparing.DEFAULT_METHOD,
        "visual tokens",
        "144",
        "14",
        "MACs, total",
        "key-value cache",
    ):
        assert word in result.stdout
    assert " ms" not in result.stdout and "relative to bare" in result.stdout
    assert Image.open(tmp_path / "overlay.png").width > 2 * picture().width  # the original beside it
    assert os.listdir(tmp_path) == ["overlay.png"]


def test_run_of_methods_that_leave_nothing_or_work_out(vlmtok_, tmp_path):
    """Work that is left out for tokens that stay is a result; a method that did nothing at all is none."""
    done = vlmtok_("run", "--method", "ima", "--overlay", tmp_path / "overlay.png")
    assert done.exit_code == 0 and "fewer" in done.output and "no token leaves" in done.output
    done = vlmtok_("run", "--method", "evs", "--overlay", tmp_path / "overlay.png")
    assert done.exit_code != 0 and "EVS takes tokens of clips alone" in " ".join(done.output.split())


def test_run_writes_a_page(vlmtok_, tmp_path, monkeypatch):
    words = ("run", "--max-new-tokens", 2, "--rounds", 1, "--html", "page.html")
    result = vlmtok_(*words)
    assert result.exit_code == 0 and "page     page.html" in result.stdout
    (data,) = read((tmp_path / "page.html").read_text("utf-8")).json()["methods"]
    assert data["name"] == comparing.DEFAULT_METHOD and len(data["states"]) == 2
    several = data_of(vlmtok_(*words, "--method", "todre:keep=0.1,0.5", "--method", "fastv", "--json"))
    assert several["page"] == "page.html" and len(several["rows"]) == 4
    names = [one["name"] for one in read((tmp_path / "page.html").read_text("utf-8")).json()["methods"]]
    assert names == ["todre:keep=0.1", "todre:keep=0.5", "fastv"]

    def full(*given, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    result = vlmtok_(*words)
    assert result.exit_code == 0 and "not written to 'page.html': no space left" in result.stdout
    assert "visual tokens" in result.stdout  # a page is no reason to lose a table


def test_run_with_everything_said(vlmtok_, package, tmp_path):
    picture(200, 100).save(tmp_path / "mine.png")
    model = package / loading.EMBEDDED
    words = ("--model", model, "--image", "mine.png", "--prompt", "how many circle ?", "--method", "tome:r=4+fastv")
    more = ("--device", "cpu", "--dtype", "bfloat16", "--max-new-tokens", 2, "--rounds", 1, "--overlay", "drawn.png")
    found = data_of(vlmtok_("run", *words, *more, "--json"))
    assert found["model"] == str(model) and found["prompt"] == "how many circle ?" and found["dtype"] == "bfloat16"
    assert found["method"] == "tome:r=4+fastv" and found["image"] == "mine.png" and found["overlay"] == "drawn.png"
    assert found["bare"]["visual_tokens"] == 144 and found["compressed"]["visual_tokens"] == 144 - 4 * 4
    assert (
        found["report"]["layers"] and found["environment"]["torch"] and set(found["speedup"]) == {"prefill", "answer"}
    )
    assert Image.open(tmp_path / "drawn.png").width > 640
    loaded = loading.load(str(model), dtype="bfloat16")
    asked = comparing.compare(
        loaded, picture(200, 100), "how many circle ?", "tome:r=4+fastv", max_new_tokens=2, rounds=1
    )
    assert found["bare"]["answer"] == asked.bare.text and found["compressed"]["answer"] == asked.compressed.text


def test_run_on_towers(vlmtok_, tower):
    found = data_of(vlmtok_("run", "--model", tower, "--method", "tome:r=2", "--rounds", 1, "--json"))
    assert found["bare"]["classes"][0]["label"] in ("cat", "dog", "fish") and found["prompt"] is None
    assert found["loyalty"]["cosine"] > 0 and "kv_bytes" not in found["bare"]
    words = ("run", "--model", "timm:vit_tiny_patch16_224", "--random", "--rounds", 1)
    result = vlmtok_(*words)
    assert result.exit_code == 0 and "weights are random" in result.stdout and "PiToMe" not in result.stderr


# ---------------------------------------------------------------------- list, show, estimate
def test_list_shows_the_registry(vlmtok_):
    found = data_of(vlmtok_("list", "--json"))["methods"]
    assert [row["name"] for row in found] == list_methods()
    todre = next(row for row in found if row["name"] == "todre")
    assert todre["stages"] == ["projected", "decoder"] and todre["adapters"] == ["transformers-vlm"]
    assert todre["arxiv"] == "2505.18757" and todre["training_free"]
    text = vlmtok_("list", "*prune*").stdout
    assert "transprune" in text and "todre" not in text


def test_list_models_shows_adapters_families_and_presets(vlmtok_):
    from vlmtok.adapters import REFUSED
    from vlmtok.adapters.language import families as vlm_rows

    found = data_of(vlmtok_("list", "--models", "--json"))
    assert {row["adapter"] for row in found["adapters"]} == set(catalogue.ADAPTERS)
    families = {row["family"]: row for row in found["families"]}
    assert set(vlm_rows.ROWS) | set(vlm_rows.REFUSED) <= set(families) and len(families) > len(vlm_rows.ROWS) + len(
        REFUSED
    )
    stages = ["vision", "features", "projected", "decoder", "cache"]
    assert families["mllama"]["refused"] and families["llava"]["stages"] == stages
    text = vlmtok_("list", "--models").stdout
    assert "llava-1.5-7b" in text and "cross-attention" in text


@pytest.mark.parametrize("row", ["timm ViT", "timm SigLIP", "HF CLIPModel", "HF LLaVA", "open_clip VisionTransformer"])
def test_the_catalogue_agrees_with_what_runs(row):
    matrix = json.loads((ROOT / "tests" / "matrix.json").read_text())
    kind = {
        "timm ViT": "tower",
        "timm SigLIP": "tower, no CLS",
        "HF CLIPModel": "dual",
        "HF LLaVA": "VLM, slots",
        "open_clip VisionTransformer": "tower",
    }[row]
    for name in list_methods():
        if method_class(name).wants:  # shown as it is with the signals that it wants of a user
            continue
        assert (kind in catalogue.kinds_of(name)) == matrix[name][row].startswith("runs"), (name, matrix[name][row])


def test_show_names_paper_parameters_sites_and_deviations(vlmtok_):
    text = " ".join(vlmtok_("show", "pitome:ratio=0.95").stdout.split())
    for word in ("2405.16148", "margin", "vision layer 0 mid", "keys", "differs from the released code", "presets"):
        assert word in text, word
    found = data_of(vlmtok_("show", "todre:keep=0.2+tome", "--json"))["methods"]
    assert [row["name"] for row in found] == ["todre", "tome"] and found[0]["settings"]["keep"] == 0.2
    assert found[0]["sites"][0]["needs"] == ["cls_attention@vision:-1"]
    for name in list_methods():
        entry = catalogue.entry(name)
        assert all(parameter.what for parameter in entry.parameters), name
        assert entry.summary and entry.paper and bool(entry.presets) == hasattr(method_class(name), "preset")


def test_show_says_where_a_method_costs_more_than_it_saves(vlmtok_):
    text = " ".join(vlmtok_("show", "tome").stdout.split())
    assert "time of one picture (batch 1)" in text and "costs more than it saves" in text and "H200" in text
    (found,) = data_of(vlmtok_("show", "scope", "--json"))["methods"]
    chosen = [row for row in found["batch_one"] if row["selection"] is not None]
    assert chosen and all(0 < row["selection"] < 1 and not row["costs_more_than_it_saves"] for row in chosen)
    assert "batch 1" not in vlmtok_("show", "kv_norm").stdout


def test_show_says_what_a_method_chose_by_itself(vlmtok_):
    text = " ".join(vlmtok_("show", "crossget", "--model", "timm:vit_base_patch16_siglip_224").stdout.split())
    assert text.count("merges without guidance (guidance=None): the tower of timm-vit has no class token") == 1
    found = data_of(vlmtok_("show", "crossget+tca+tome", "--model", "timm:vit_base_patch16_siglip_224", "--json"))
    said = [method["remarks"] for method in found["methods"]]
    assert "guidance=None" in said[0][0] and "reservoir_size=0" in said[1][0] and said[2] == []


def test_show_on_a_model_draws_its_overlay(vlmtok_, package, tmp_path):
    picture().save(tmp_path / "mine.png")
    model = package / loading.EMBEDDED
    found = data_of(vlmtok_("show", "todre", "--model", model, "--image", "mine.png", "--overlay", "o.png", "--json"))
    assert found["overlay"] == "o.png" and (tmp_path / "o.png").exists()
    assert found["methods"][0]["sites"][1]["site"] == "decoder layer 13 end"  # of 16 layers
    assert "transformers-vlm (llava)" in vlmtok_("show", "todre", "--model", model).stdout


def test_estimate_gives_what_the_function_gives(vlmtok_, tower):
    report = estimate("llava-1.5-7b", "fastv", text_tokens=40, convention="fastv")
    words = ("estimate", "llava-1.5-7b", "--method", "fastv", "--text-tokens", 40)
    found = data_of(vlmtok_(*words, "--convention", "fastv", "--json"))
    assert found["total_macs"] == report.to_dict()["total_macs"] and found["figure"] == report.to_dict()["figure"]
    assert vlmtok_(*words, "--csv").stdout == estimate("llava-1.5-7b", "fastv", text_tokens=40).to_csv()
    assert vlmtok_(*words, "--markdown").stdout.startswith("**")
    assert "key-value cache" in vlmtok_(*words).stdout
    assert data_of(vlmtok_("estimate", tower, "--json"))["methods"] == ["pitome"]
    assert (
        data_of(vlmtok_("estimate", "timm:vit_base_patch16_224", "--method", "tome:r=16", "--json"))["cache_bytes"]
        is None
    )


def test_estimate_takes_sizes_of_pictures_and_frames(vlmtok_, folder_of_next):
    words = ("estimate", "qwen2.5-vl-7b", "--method", "divprune:keep=0.25", "--image-size")
    one = data_of(vlmtok_(*words, "896x896", "--json"))
    assert one["layers"][-1]["before"] == 1024 + 64 and "1,024 visual tokens" in one["notes"][0]
    two = data_of(vlmtok_(*words, "896x896", "--image-size", "448x448", "--json"))
    assert two["layers"][-1]["before"] == 1024 + 256 + 64
    clip = data_of(vlmtok_(*words, "448X448", "--frames", 8, "--json"))
    assert clip["layers"][-1]["before"] == 4 * 256 + 64
    asked = vlmtok_("estimate", folder_of_next, "--method", "fastv", "--visual-tokens", 60)
    assert asked.exit_code == 2 and "pass --crops, or --image-size" in asked.stderr
    told = data_of(vlmtok_("estimate", folder_of_next, "--method", "fastv", "--image-size", "128x96", "--json"))
    assert told["layers"][0]["before"] == 17 and "5 rows of the tower" in told["notes"][0]


def test_bench_shows_the_picture_in_a_size(vlmtok_, folder_of_next):
    words = ("bench", "--model", folder_of_next, "--method", "divprune:keep=0.5", "--rounds", 1, "--limit", 0)
    found = [
        data_of(vlmtok_(*words, "--max-new-tokens", 1, "--image-size", size, "--json"))["rows"][0]["visual_tokens"]
        for size in ("128x96", "40x200")
    ]
    assert found == [70, 40]  # as their processor says


@pytest.fixture
def folder_of_next(tmp_path):
    return str(llava_next(tmp_path / "next"))


# ---------------------------------------------------------------------- bench
def test_bench_of_one_model(vlmtok_, tower, tmp_path):
    words = (
        "bench",
        "--model",
        tower,
        "--method",
        "tome:r=3",
        "--rounds",
        2,
        "--csv",
        "rows.csv",
        "--out",
        "rows.json",
    )
    (row,) = data_of(vlmtok_(*words, "--json"))["rows"]
    assert row["method"] == "tome:r=3" and row["seconds"] is None and row["rounds"] == 2 and row["measured"]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [row]
    (line,) = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert float(line["speedup"]) == row["speedup"] and line["torch"] == row["torch"]
    assert "relative to bare" in vlmtok_(*words).stdout


def test_bench_alone_without_a_gpu_says_not_measured(vlmtok_, monkeypatch):
    monkeypatch.setattr(suite_modelled, "FULL", replace(suite_models.FULL, towers=("tome:r=23",), languages=("fastv",)))
    result = vlmtok_("bench", "--device", "cpu")
    assert result.exit_code == 0 and "not measured" in result.stdout and "LLaVA-NeXT-7B shape" in result.stdout


def test_bench_of_everything(vlmtok_, tmp_path):
    words = ("bench", "--all", tmp_path, "--only", "launches", "--device", "cpu")
    found = data_of(vlmtok_(*words, "--json"))
    assert [Path(file).name for file in found["files"]] == ["launches_modelled_h200.json", "card_modelled_h200.md"]
    counted = "counted on meta tensors, attention as one launch"
    assert found["policies"] is None and found["status"] == {"launches": counted}
    assert "card_modelled_h200.md" in (printed := vlmtok_(*words).output) and f"launches: {counted}" in printed


def test_bench_tiny_runs_the_suite(vlmtok_, monkeypatch):
    small = replace(
        suite_models.TINY, tower_batches=(1,), visual={"small": 36}, crops={"small": 1}, sweep=(16,), steps=2
    )
    small = replace(small, text=(64, 4, 4, 128, 128))
    monkeypatch.setattr(suite_models, "TINY", replace(small, towers=("tome:r=3",), languages=("fastv",)))
    rows = data_of(vlmtok_("bench", "--tiny", "--device", "cpu", "--rounds", 1, "--limit", 0, "--json"))["rows"]
    assert {row["stage"] for row in rows} >= {"tower", "prefill", "generate", "tower + generate", "break-even"}
    assert all(row["measured"] for row in rows)


# ---------------------------------------------------------------------- bad input
BAD = {
    "keep of 0": ("run --method todre:keep=0", "keep=0 is not possible"),
    "keep of 1.5": ("run --method todre:keep=1.5", "keep=1.5 is not possible"),
    "keep of True": ("run --method todre:keep=True", "keep=True is not possible"),
    "negative r": ("run --method tome:r=-1", "r=-1"),
    "no such layer": ("run --method todre:check_layer=99", "layer 99 does not exist"),
    "no such tower layer": ("run --method tca:layers=(77;)", "layer 77 does not exist"),
    "unknown method": ("run --method tomee", "did you mean 'tome'"),
    "unknown parameter": ("run --method todre:kep=0.1", "did you mean 'keep'"),
    "no setting": ("run --method todre:keep", "write key=value"),
    "no adapter": ("run --model timm:resnet18 --random", "no adapter carries"),
    "refused model": ("run --model timm:swin_tiny_patch4_window7_224 --random", "shifted windows"),
    "stage not there": ("run --model timm:vit_tiny_patch16_224 --random --method fastv", "acts at stage 'decoder'"),
    "no picture": ("run --image words.png", "no picture that Pillow can read"),
    "no such file": ("run --image nowhere.png", "no such file"),
    "prompt without picture": ("run --prompt hello", "add --image FILE"),
    "prompt without picture, model": ("run --model MODEL --prompt hello", "add --image FILE"),
    "prompt for a tower": ("run --model TOWER --image mine.png --prompt hello", "takes a picture and no prompt"),
    "two marks": ("run --image mine.png --prompt <image><image>?", "2 image marks"),
    "unwritable overlay": ("run --overlay nowhere/overlay.png", "no folder 'nowhere'"),
    "unwritable page": ("run --html nowhere/page.html", "no folder 'nowhere'"),
    "overlay in a file": ("run --overlay words.png/overlay.png", "cannot write"),
    "overlay without format": ("run --overlay overlay.xyz", "use .png"),
    "unwritable table": ("bench --model TOWER --csv nowhere/rows.csv", "no folder 'nowhere'"),
    "no such folder": ("run --model ./nowhere", "no such folder"),
    "no checkpoint there": ("run --model .", "no config.json"),
    "hub out of reach": ("run --model owner/model", "HF_HUB_OFFLINE is set"),
    "no such timm model": ("run --model timm:vit_tinny", "no model 'vit_tinny'"),
    "no such device": ("run --device frob", "device 'frob'"),
    "no such dtype": ("run --dtype int8", "dtype 'int8'"),
    "no rounds": ("run --rounds 0", "--rounds"),
    "no such option": ("run --frobnicate", "--frobnicate"),
    "no such command": ("frobnicate", "frobnicate"),
    "show of nothing": ("show", "METHOD"),
    "show an unknown method": ("show tomee", "did you mean 'tome'"),
    "list of nothing": ("list *frob*", "no method matches"),
    "no such preset": ("estimate llava-9", "no preset 'llava-9'"),
    "no such convention": ("estimate llava-1.5-7b --method fastv --convention frob", "no convention 'frob'"),
    "no size": ("estimate llava-1.5-7b --image-size 896", "width and height in pixels, for instance 896x672"),
    "a size of nothing": ("estimate llava-1.5-7b --image-size 0x5", "width and height in pixels"),
    "frames without a size": ("estimate qwen2.5-vl-7b --frames 4", "--image-size (width, height) says how large"),
    "frames of a picture": ("estimate gemma3-4b --frames 4 --image-size 9x9", "takes pictures and no video"),
    "size without model": ("bench --image-size 9x9", "need --model"),
    "batch without model": ("bench --batch 2", "need --model"),
    "dtype of everything": ("bench --all . --dtype float16", "need --model"),
    "tokens of everything": ("bench --all . --max-new-tokens 8", "need --model"),
    "random without model": ("bench --tiny --random", "need --model"),
    "two forms": ("estimate llava-1.5-7b --json --csv", "one of"),
    "method without model": ("bench --method tome", "need --model"),
    "part of nothing": ("bench --only kernels", "--only chooses from --all"),
    "unknown part": ("bench --all . --only towers", "no part 'towers'"),
    "everything in a table": ("bench --all . --csv rows.csv", "writes files of its own"),
    "everything of a model": ("bench --all . --model TOWER", "takes no --model"),
    "no batch": ("bench --model TOWER --batch 0", "--batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, vlmtok_, tower, package, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    picture().save(tmp_path / "mine.png")
    line, what = BAD[case]
    words = line.replace("TOWER", tower).replace("MODEL", str(package / loading.EMBEDDED)).split()
    result = vlmtok_(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("vlmtok: ")
    assert what in result.stderr and "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["mine.png", "words.png"]  # nothing was written


def test_an_error_of_ours_is_not_hidden(vlmtok_, monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("a bug")

    monkeypatch.setattr(comparing, "compare", broken)
    result = vlmtok_("run")
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)


# ---------------------------------------------------------------------- as a program
def program(*words, cwd, **more):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, **more)


def test_help_imports_nothing_heavy(tmp_path):
    check = "import sys; from vlmtok import cli; cli.app(['--help'], standalone_mode=False); "
    check += "print([m for m in ('torch', 'transformers', 'timm', 'open_clip', 'numpy', 'PIL') if m in sys.modules])"
    result = program("-c", check, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "run" in result.stdout and "estimate" in result.stdout and result.stdout.rstrip().endswith("[]")


def test_run_as_a_program_on_the_checkpoint_that_ships(tmp_path):
    result = program("-m", "vlmtok.cli", "run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    sample = loading.samples()[0]
    assert found["model"] == "tiny-llava" and found["trained"] and found["bare"]["answer"] == sample.answer
    assert found["bare"]["visual_tokens"] == 144 and found["compressed"]["total_macs"] < found["bare"]["total_macs"]
    assert (tmp_path / "overlay.png").exists() and result.stderr == ""


def test_bad_input_as_a_program(tmp_path):
    result = program("-m", "vlmtok.cli", "run", "--method", "todre:keep=0", "--json", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_the_version(vlmtok_):
    assert vlmtok_("--version").stdout.strip() == vlmtok.__version__
