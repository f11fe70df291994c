"""Trying and showing: comparisons, overlays, the suite, the catalogue, the self-test. Its modules come on first use."""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING

_MODULES = (
    "catalogue",
    "compare",
    "comparison",
    "controls",
    "doctor",
    "explore",
    "knobs",
    "matrix",
    "overlay",
    "pages",
    "plots",
    "prompts",
    "runners",
    "suite",
    "sweep",
    "tables",
    "tiny",
    "zero_shot",
)

if TYPE_CHECKING:
    from . import catalogue as catalogue
    from . import compare as compare
    from . import comparison as comparison
    from . import controls as controls
    from . import doctor as doctor
    from . import explore as explore
    from . import knobs as knobs
    from . import matrix as matrix
    from . import overlay as overlay
    from . import pages as pages
    from . import plots as plots
    from . import prompts as prompts
    from . import runners as runners
    from . import suite as suite
    from . import sweep as sweep
    from . import tables as tables
    from . import tiny as tiny
    from . import zero_shot as zero_shot
else:

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return _importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return list(_MODULES)
