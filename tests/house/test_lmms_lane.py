"""What tries the model for lmms-eval: its script, its conftest, and that CI runs it and the main suite does not."""

import os
import re
import subprocess
import sys

import pytest
from support.places import ROOT

PLACE = ROOT / "integrations" / "lmms_eval"
SCRIPT = (ROOT / ".ci" / "lmms-eval").read_text("utf-8")


def test_ci_runs_it_and_the_main_suite_collects_none_of_it(request):
    assert request.config.getini("testpaths") == ["tests"]
    assert not any("integrations" in str(item.path) for item in request.session.items)
    assert "\n.ci/lmms-eval\n" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert os.access(ROOT / ".ci" / "lmms-eval", os.X_OK)


def test_the_page_installs_what_ci_tries():
    """One release of lmms-eval, and what it forgets to ask for."""
    wanted = set(re.findall(r'"((?:lmms-eval|filelock)[^"]*)"', SCRIPT))
    assert len(wanted) == 2
    page = (ROOT / "docs" / "howto" / "lmms-eval.md").read_text("utf-8")
    assert all(f'"{one}"' in page for one in wanted)
    assert "integrations/lmms_eval/tests" in SCRIPT and len(list((PLACE / "tests").glob("test_*.py"))) >= 2


def test_it_fails_where_an_environment_cannot_be_made(tmp_path):
    """Not a skip: there is a wheel for every system. Nothing is left behind."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").write_text("#!/bin/sh\nexit 7\n")
    (tools / "python3").chmod(0o755)
    (tmp_path / "temporary").mkdir()
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run([ROOT / ".ci" / "lmms-eval"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7 and not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("missing", ["lmms_eval", "vlmtok"])
def test_without_lmms_eval_the_run_ends_in_one_line(tmp_path, missing):
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    for name in ("lmms_eval", "vlmtok"):
        text = "raise ImportError('no library')" if name == missing else ""
        (stand_ins / f"{name}.py").write_text(text)
    (tmp_path / "conftest.py").write_text((PLACE / "tests" / "conftest.py").read_text("utf-8"))
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_a(): pytest.skip('no reason')\n")
    env = {**os.environ, "PYTHONPATH": str(stand_ins), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    go = [sys.executable, "-m", "pytest", "-q", str(tmp_path)]
    done = subprocess.run(go, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.strip().splitlines()
    assert f"{missing} cannot be imported here (no library)" in line and ".ci/lmms-eval" in line
    (stand_ins / f"{missing}.py").write_text("")
    done = subprocess.run(go, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "was skipped: " in done.stdout
