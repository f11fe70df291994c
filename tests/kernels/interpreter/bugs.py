"""Bugs that are put into copies of the kernels, gathered from `bugs_*.py`: source alone, which imports without triton.

Each table has a name for a bug, and ``(module, piece, wrong, check)``: `piece` of ``triton_<module>.py`` becomes
`wrong`, and `check` of `checks.py` must fail.
"""

from __future__ import annotations

import importlib
from pathlib import Path

_TABLES = [importlib.import_module(path.stem).BUGS for path in sorted(Path(__file__).parent.glob("bugs_*.py"))]
BUGS: dict[str, tuple[str, str, str, str]] = {name: bug for table in _TABLES for name, bug in table.items()}
if len(BUGS) != sum(map(len, _TABLES)):
    raise ValueError("two bugs have one name")
