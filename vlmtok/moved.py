"""Names of modules before the package had wings: they still import, with a warning that says where things are now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES: dict[str, tuple[str, ...]] = {
    "attachment": ("core.attachment", "core.hooks", "core.threads"),
    "bench": ("timing",),
    "catalogue": ("lab.catalogue", "lab.family_table"),
    "conventions": ("cost.conventions",),
    "doctor": ("lab.doctor",),
    "flops": ("cost.flops", "core.model_shape"),
    "ledger": ("core.ledger",),
    "method": ("core.method", "core.site", "core.registry", "core.spec", "core.settings"),
    "overhead": ("cost.overhead", "cost.rehearsal"),
    "plan": ("cost.plan", "cost.planned_rows"),
    "presets": ("forecast.presets",),
    "reduction": ("core.reduction",),
    "report": ("cost.report", "cost.assemble", "cost.lines", "cost.render", "cost.units"),
    "rows": ("core.rows", "core.pictures", "core.row_data", "core.row_state"),
    "sequence": ("core.sequence",),
    "session": ("lab.compare", "lab.comparing", "lab.comparison", "lab.runners", "lab.prompts", "loading"),
    "signals": ("core.signals",),
    "stream": ("core.stream",),
    "suite": ("lab.suite", "lab.suite_measure", "lab.suite_modelled", "lab.suite_models"),
    "tables": ("lab.tables",),
    "tiny": ("lab.tiny",),
    "trace": ("core.trace",),
    "view": ("core.view",),
    "viz": ("lab.overlay",),
}
"""Old name to the modules among which its contents were divided, all below ``vlmtok``."""


class Moved(ModuleType):
    """Stands where a module was; its attributes are those of the modules that took its contents over."""

    def __getattr__(self, name: str) -> Any:
        """Looks the name up where it is now."""
        package, _, old = self.__name__.partition(".")
        places = MODULES[old]
        if not name.startswith("__"):
            for place in places:
                module = importlib.import_module(f"{package}.{place}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; see {', '.join(places)}")


class Finder(MetaPathFinder, Loader):
    """Finds the names of `MODULES` where no file is called so."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The specification of a module that has moved, or None."""
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module that looks things up."""
        return Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Says where it went."""
        package, _, old = module.__name__.partition(".")
        places = " and ".join(f"{package}.{place}" for place in MODULES[old])
        warnings.warn(f"{module.__name__} is now {places}; the old name goes in 0.3", DeprecationWarning, stacklevel=2)
