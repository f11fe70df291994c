"""Runs `interpreter/` in a process of its own: Triton interprets or compiles, and decides when it is imported."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_the_page_says_how_many_bugs_there_are(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    page = (FOLDER.parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"the checks themselves \| (\d+) bugs", page)
    assert int(said) == len(importlib.import_module("bugs").BUGS)
