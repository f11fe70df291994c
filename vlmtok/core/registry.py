"""Methods by name: the registry, and entry points of other packages."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import pkgutil
import re
import warnings
from typing import Any, TypeVar

from ..errors import ParameterError, UnknownMethod, VlmtokWarning, hint
from ..guard import guarded
from .aliases import resolve, spoken
from .method import Method, setting_fields

_METHODS: dict[str, type[Method]] = {}

_loaded = False

M = TypeVar("M", bound=type[Method])


def register_method(cls: M) -> M:
    """Class decorator: makes a method known by its name.

    Raises:
        ParameterError: another class already has the name, or an alias stands for no parameter.
    """
    name = cls.spec_name()
    other = _METHODS.get(name)
    same = other is not None and (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
    if other is not None and not same:
        raise ParameterError(f"method name {name!r} of {cls.__module__} is already taken by {other.__module__}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ParameterError(f"method name {name!r} must be lower-case letters, digits and _")
    known = {item.name for item in setting_fields(cls)}
    for alias in cls.aliases:
        if alias.name in known or alias.parameter not in {*known, ""}:
            raise ParameterError(
                f"method {name!r}: alias {alias.name!r} of {alias.parameter!r} must be no parameter, and stand for one"
            )
    _METHODS[name] = cls
    return cls


def _load() -> None:
    """Imports every module of pruners/ and mergers/, then the entry points, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for folder in ("pruners", "mergers"):
        package = importlib.import_module(f"..{folder}", __package__)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in importlib.metadata.entry_points(group="vlmtok.methods"):
        try:
            entry.load()
        except Exception as problem:
            warnings.warn(f"method plug-in {entry.name!r} does not load: {problem!r}", VlmtokWarning, stacklevel=3)


def list_methods(pattern: str = "*") -> list[str]:
    """Names of the registered methods.

    Args:
        pattern: shell wildcards, for instance ``"*prune*"``.

    Returns:
        Sorted names.

    Raises:
        ParameterError: the pattern is no text.
    """
    if not isinstance(pattern, str):
        raise ParameterError(f"list_methods() takes shell wildcards, got {pattern!r}")
    _load()
    return sorted(fnmatch.filter(_METHODS, pattern))


def method_class(name: str) -> type[Method]:
    """The class registered under a name.

    Raises:
        UnknownMethod: none is; the message names the nearest.
    """
    _load()
    if not isinstance(name, str):
        raise UnknownMethod(f"a method's name is a word, got {name!r}")
    if name not in _METHODS:
        raise UnknownMethod(f"no method {name!r}{hint(name, _METHODS, 3, 0.4)} Known: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


@guarded
def create_method(name: str, **settings: Any) -> Method:
    """Makes a method by name.

    Args:
        name: as in `list_methods`.
        settings: its parameters, under their own names or the paper's (`Method.aliases`); ``preset=NAME`` starts
            from one of its presets.

    Returns:
        The method.

    Raises:
        UnknownMethod: no such method.
        ParameterError: no such parameter, or a value that is not possible.
    """
    cls = method_class(name)
    known = [item.name for item in setting_fields(cls)]
    others = [alias.name for alias in cls.aliases]
    preset = settings.pop("preset", None)
    for key in settings:
        if key not in known and key not in others:
            like = hint(key, [*known, *others], alike=0.4)
            raise ParameterError(f"{name} has no parameter {key!r}{like} Parameters: {', '.join(known) or 'none'}")
    if preset is not None and not hasattr(cls, "preset"):
        raise ParameterError(f"{name} has no presets")
    values = resolve(name, cls.aliases, settings)
    try:
        return cls(**values) if preset is None else cls.preset(preset, **values)  # type: ignore[attr-defined]
    except ParameterError as problem:
        said = spoken(cls.aliases, settings)
        if not said:
            raise
        raise ParameterError(f"{problem}{said}") from problem
