"""The entry point, the task of the shipped pictures, and what becomes of errors below lmms-eval's command."""

import importlib
import json
import subprocess
import sys
import types

import pytest
from support.places import ROOT

from vlmtok.errors import ParameterError
from vlmtok.harness import CLASS, MODEL, manifests, pictures
from vlmtok.harness.ending import ending


@pytest.fixture
def played(monkeypatch):
    """lmms-eval's registry, as far as `manifests` asks it."""

    class Manifest(types.SimpleNamespace):
        pass

    registry = types.ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = Manifest
    models = types.ModuleType("lmms_eval.models")
    models.AVAILABLE_CHAT_TEMPLATE_MODELS = {"huggingface": "Huggingface"}
    for module in (types.ModuleType("lmms_eval"), models, registry):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return models


def test_one_id_is_registered_and_listed(played):
    (made,) = manifests()
    assert made.model_id == MODEL == "vlmtok" and made.chat_class_path == CLASS
    assert played.AVAILABLE_CHAT_TEMPLATE_MODELS["vlmtok"] == CLASS
    del played.AVAILABLE_CHAT_TEMPLATE_MODELS  # a release that lists by the registry
    assert [one.model_id for one in manifests()] == ["vlmtok"]


def test_the_entry_point_and_the_class_exist():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert '[project.entry-points."lmms_eval.models"]\nvlmtok = "vlmtok.harness:manifests"\n' in text
    module, _, name = CLASS.rpartition(".")
    assert f"class {name}(lmms)" in (ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8")
    assert importlib.import_module("vlmtok.harness").manifests is manifests


def test_the_task_asks_what_ships(tmp_path):
    assert pictures.main([str(tmp_path / "new" / "folder")]) == 0
    folder = tmp_path / "new" / "folder"
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text("utf-8").splitlines()]
    assert [row["answer"] for row in rows] == ["top left", "orange", "blue cross", "5", "2", "star"]
    scope = {}
    exec((folder / "shown.py").read_text("utf-8"), scope)
    assert [scope["pictures"](row)[0].mode for row in rows] == ["RGB"] * 6
    assert str(folder / "questions.jsonl") in (folder / "vlmtok_pictures.yaml").read_text("utf-8")


def test_a_folder_that_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert pictures.main([str(tmp_path / "file")]) == 1
    assert "cannot write the task" in capsys.readouterr().err
    assert pictures.main([]) == 2 and pictures.main(["--help"]) == 0


COMMAND = """
from vlmtok.errors import ParameterError
from vlmtok.harness.ending import ending

def cli_evaluate():
    for problem in (ParameterError("no such thing"), KeyError("of a host")):
        try:
            with ending():
                raise problem
        except Exception:
            print("swallowed")

cli_evaluate()
"""


def test_errors_end_the_command_and_nothing_else(tmp_path):
    with pytest.raises(ParameterError, match="plain"), ending():
        raise ParameterError("plain")
    package = tmp_path / "lmms_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(COMMAND)
    (tmp_path / "another.py").write_text(COMMAND)
    runs = {
        name: subprocess.run([sys.executable, "-m", name], cwd=tmp_path, capture_output=True, text=True)
        for name in ("lmms_eval", "another")
    }
    ended, alive = runs["lmms_eval"], runs["another"]
    assert ended.returncode == 1 and ended.stdout == "" and ended.stderr == "vlmtok: ParameterError: no such thing\n"
    assert alive.returncode == 0 and alive.stdout == "swallowed\nswallowed\n"
    (package / "__main__.py").write_text(COMMAND.replace('ParameterError("no such thing")', 'KeyError("of a host")'))
    done = subprocess.run([sys.executable, "-m", "lmms_eval"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stderr.endswith("KeyError: 'of a host'\n")
