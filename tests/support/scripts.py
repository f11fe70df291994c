"""Scripts of the checkout, which lie outside the package."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .places import ROOT


def script(path: str) -> ModuleType:
    """A script as a module, by its path from the root."""
    loader = importlib.machinery.SourceFileLoader(f"script_{Path(path).stem}", str(ROOT / path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module
