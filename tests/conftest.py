"""What every test gets: seeds, one thread a worker, uninitialised memory full of NaN, and no skips but for `gpu`."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from vlmtok.adapters.host_faults import fault_of

from vlmtok.errors import UnsupportedModel

# Files of a seed are the same on every machine and nothing is stored between runs.
settings.register_profile(
    "vlmtok",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("vlmtok")


def pytest_configure(config):
    torch.set_num_threads(1)
    # torch.empty gives NaN, so that a read of what nobody wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name in ("transformers", "timm", "open_clip", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for line in (
        "ignore::DeprecationWarning:(timm|open_clip|transformers|torch|torchvision|huggingface_hub).*",
        "ignore::FutureWarning:(timm|open_clip|transformers|torch|torchvision|huggingface_hub).*",
        # Deterministic mode is on for the sake of fill_uninitialized_memory.
        "ignore:.*does not have a deterministic implementation.*:UserWarning",
        "ignore:Using a target size:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A test may be skipped for want of a GPU; any other skip hides something and fails."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and only tests marked gpu may be: {report.longrepr}"


def _excuse(item):
    """A family that the installed host cannot run bare may fail as it fails bare.

    `families/test_bare.py` holds that it cannot; what needs no run of it is still tested.
    """
    named = list(getattr(item, "callspec", None).params.values()) if hasattr(item, "callspec") else []
    named += [name for mark in item.iter_markers("runs") for name in mark.args]
    for name in named:
        why = fault_of(name) if isinstance(name, str) else None
        if why is not None:
            item.add_marker(pytest.mark.xfail(reason=why, raises=(AttributeError, UnsupportedModel), strict=False))


def pytest_collection_modifyitems(items):
    for item in items:
        _excuse(item)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA or HIP device"))
