"""What every test gets: no network, one thread, no skips; and no run without lmms-eval."""

from __future__ import annotations

import importlib
import os

import pytest

for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)


def pytest_configure(config):
    """Ends the run in one line where the plug-in cannot be tested."""
    for module in ("lmms_eval", "vlmtok"):
        try:
            importlib.import_module(module)
        except ImportError as problem:
            raise pytest.UsageError(
                f"these tests need an environment with lmms_eval and vlmtok, and {module} cannot be imported here "
                f"({problem}); `.ci/lmms-eval` makes one and runs them"
            ) from problem


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Nothing here is optional; a skip hides something and fails."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {report.longrepr}"
