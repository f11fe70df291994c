"""What every test of the plug-in gets: the settings of a CPU run, no skips but for `gpu`; and no run without vLLM."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

NEEDED = ("vllm", "vlmtok", "vlmtok_vllm")


def settings(text: str) -> dict[str, str]:
    """Variables of a file of lines ``NAME=value``; empty lines and those that begin with ``#`` are left out."""
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


# Before anything imports vLLM, which reads them once. What the caller has set stays.
for name, value in settings(Path(__file__).with_name("cpu.env").read_text("utf-8")).items():
    os.environ.setdefault(name, value)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


def pytest_configure(config):
    """Ends the run in one line where the plug-in cannot be tested, in place of a page of skips or import errors."""
    for module in NEEDED:
        try:
            importlib.import_module(module)
        except ImportError as problem:
            raise pytest.UsageError(
                f"the tests of the plug-in need an environment with {', '.join(NEEDED)}, and {module} cannot be "
                f"imported here ({problem}); `python3 .ci/vllm` makes one and runs them"
            ) from problem


def pytest_collection_modifyitems(config, items):
    marked = {mark: [item for item in items if item.get_closest_marker(mark) is not None] for mark in ("long", "gpu")}
    for item in marked["long"]:
        item.user_properties.append(("long", True))  # for the record that .ci/vllm writes
    if not config.getoption("long"):
        config.hook.pytest_deselected(items=marked["long"])
        items[:] = [item for item in items if item.get_closest_marker("long") is None]
    for item in marked["gpu"]:
        if not importlib.import_module("torch").cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A test may be skipped for want of a GPU; any other skip hides something and fails."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and only tests marked gpu may be: {report.longrepr}"
