"""One process interprets kernels or compiles them: Triton decides when it is imported.

`interpreter/` runs only where TRITON_INTERPRET is set; `test_interpreter.py` starts such a process. In it, nothing else
here runs.
"""

import os

import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py"] if INTERPRETS else ["interpreter/*"]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or HIP device"))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
