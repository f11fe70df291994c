"""What every Triton kernel must get right, as functions of the modules that hold the kernels: those of `check_*.py`.

`test_kernels.py` runs them on the modules as they are, `test_mutations.py` on modules with a bug put in. The oracle is
the torch definition (itself held against naive loops elsewhere): indices exactly, also in ties.
"""

from __future__ import annotations

import importlib
from inspect import isfunction
from pathlib import Path

_MODULES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("check_*.py"))]
CHECKS = {
    name: check
    for module in _MODULES
    for name, check in vars(module).items()
    if isfunction(check) and check.__module__ == module.__name__ and not name.startswith("_")
}
