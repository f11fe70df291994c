"""Runs pytest again and again in children that find large libraries imported; used by ``tools/mutants.py`` alone.

Importing torch and transformers takes longer than most tests of a mutant, so it is done once and each run is forked
from there. Nothing of the package under test is imported here. Requests and answers are lines of JSON on the standard
streams: ``{"tests": [...], "folder": "...", "timeout": 120}`` and ``{"code": 1, "lines": [...]}``, with None as the
code after a timeout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from typing import Any


def child(tests: list[str], folder: str, output: int) -> None:
    """Becomes one run of pytest in `folder`, with what it prints in the file `output`; never returns."""
    code = 3
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.path[:] = [folder, *(path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__)))]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
        import pytest

        code = int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one request."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if not pid:
            child(request["tests"], request["folder"], output.fileno())
        ends, code = time.monotonic() + request["timeout"], None
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.02)
        else:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        output.seek(0)
        return {"code": code, "lines": [line.rstrip() for line in output if line.strip()][-40:]}


def main() -> None:
    """Imports the modules that the arguments name, where they are installed, and answers requests."""
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
