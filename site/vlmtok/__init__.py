"""vlmtok: prune and merge the visual tokens of vision-language models that already exist.

``import vlmtok`` imports torch and nothing else: timm, open_clip, transformers and triton come in when a model or a
kernel needs them.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# An uninstalled checkout keeps the adapters beside the package; setuptools maps them into it on installation.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "adapters")) and os.path.isfile(
    os.path.join(_root, "adapters", "base.py")
):
    __path__.append(_root)

_HOME = {
    "Compression": "compression",
    "Counts": "method",
    "Layout": "method",
    "Method": "method",
    "Reduction": "reduction",
    "Site": "method",
    "StageLayout": "method",
    "TokenView": "view",
    "budget": "budget",
    "compress": "compression",
    "create_method": "method",
    "estimate": "estimate",
    "keep_count": "method",
    "list_methods": "method",
    "method_class": "method",
    "parse_methods": "method",
    "register_method": "method",
    "remove": "compression",
    "zero_shot": "zero_shot",
}
_MODULES = ("errors", "flops", "kernels", "signals", "viz")


class _Package(ModuleType):
    """A function wins over the module of its name (`estimate`, `budget`), also when that is imported later."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _HOME.get(name) == name):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Public names and every registered method, on first use."""
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    elif name[:1].isupper():
        from .method import list_methods, method_class

        classes = {method_class(known).__name__: method_class(known) for known in list_methods()}
        if name not in classes:
            raise AttributeError(f"vlmtok has no {name!r}; methods: {', '.join(sorted(classes))}")
        value = classes[name]
    else:
        raise AttributeError(f"module 'vlmtok' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from .method import list_methods, method_class

    return sorted({*globals(), *_HOME, *_MODULES, *(method_class(name).__name__ for name in list_methods())})
