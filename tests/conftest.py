"""What every test gets: seeds, one thread a worker, uninitialised memory full of NaN, and no skips but for `gpu`."""

from __future__ import annotations

import logging
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from support import further, lane, since
from vlmtok.adapters.host_faults import fault_of

from vlmtok.errors import InternalError, UnsupportedModel
from vlmtok.loading import LoadError

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


def pytest_addoption(parser):
    parser.addoption("--lane", action="store_true", help="run the contract subset alone (tests/support/lane.py)")
    parser.addoption("--every-family", action="store_true", help="run all cases (tests/support/further.py)")


def pytest_ignore_collect(collection_path, config):
    left_out = config.getoption("lane") and collection_path.suffix == ".py" and not lane.belongs(collection_path)
    return left_out or None


OF_ITS_OWN = [
    # Its assisted decoding asks the assistant so, whatever the caller wrote.
    ("Passing `generation_config` together with", "transformers.generation.candidate_generator"),
    # Its own generate hands on a guidance scale beside the configuration that it made.
    ("Passing `generation_config` together with", "transformers.models.janus.modeling_janus"),
]
"""What transformers logs of calls of its own: how the message begins, and the module that calls."""


class _Deprecations(logging.Handler):
    """Raises what transformers logs of names that go: it warns of some by its logger alone."""

    def emit(self, record):
        message = record.getMessage()
        if "deprecat" in message.lower() and not any(message.startswith(m) and _called_by(c) for m, c in OF_ITS_OWN):
            raise FutureWarning(message)


def _called_by(module):
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def pytest_configure(config):
    torch.set_num_threads(1)
    # torch.empty gives NaN, so that a read of what nobody wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name in ("timm", "open_clip", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("transformers").addHandler(_Deprecations(logging.WARNING))
    for line in (
        "error::DeprecationWarning",
        "error::PendingDeprecationWarning",
        "error::FutureWarning",
        # Processors of PaliGemma and GLM make an array of a tensor, whose `__array__` takes no `copy`.
        "ignore:__array__ implementation doesn't accept:DeprecationWarning:transformers[.]models[.].*[.]processing_.*",
        # timm up to 1.0.24 declares an interface of TorchScript when it is imported.
        "ignore:`torch.jit.interface` is deprecated:FutureWarning",
        # torch's own compiler is one of the last users of `torch.jit` in torch 2.11.
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
        # Deterministic mode is on for the sake of fill_uninitialized_memory.
        "ignore:.*does not have a deterministic implementation.*:UserWarning",
        "ignore:Using a target size:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


FAULTS = []
"""Faults of vlmtok that came up in the test that runs, whoever caught them."""


def _noted(self, kind, said, place):
    _made(self, kind, said, place)
    FAULTS.append(self)


_made = InternalError.__init__
InternalError.__init__ = _noted


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """The error budget is nought: a test in which vlmtok fails by a fault of its own fails, unless it asks for that."""
    FAULTS.clear()
    outcome = yield
    if FAULTS and outcome.excinfo is None and item.get_closest_marker("internal_error") is None:
        outcome.force_exception(AssertionError(f"{len(FAULTS)} faults of vlmtok came up, the first: {FAULTS[0]}"))


@pytest.fixture(autouse=True)
def _seeded():
    if "transformers.utils.logging" in sys.modules:  # what is logged once is logged once in every test
        sys.modules["transformers.utils.logging"].warning_once.cache_clear()
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
            item.add_marker(
                pytest.mark.xfail(reason=why, raises=(AttributeError, LoadError, UnsupportedModel), strict=False)
            )


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if not (since.too_old(item.nodeid) or since.lacking(item.nodeid))]
    if config.getoption("lane"):
        kept = lane.chosen(kept)
    elif not config.getoption("every_family"):
        kept = further.thinned(kept)
    left_out = {*items} - {*kept}
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = kept
    for item in items:
        _excuse(item)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA or HIP device"))
