"""What our own code reads of its hosts, taken from that code: no name of a host is written down here a second time."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from vlmtok.adapters import hosts
from vlmtok.adapters.hosts import Role
from vlmtok.adapters.language import intake as decoder_intake
from vlmtok.adapters.language import masks, signatures
from vlmtok.adapters.language.spec import BlockRule, VLMSpec

from vlmtok.errors import UnsupportedModel

from .classes import Signature, dotted

ROLES: dict[str, Role] = {name: role for name, role in vars(hosts).items() if isinstance(role, Role)}
"""What hosts hand around, by the names that `adapters/hosts.py` gives it."""


class NothingRead(RuntimeError):
    """Our code reads nothing where something was looked for: the facts would hold for want of questions."""


def role_of(name: str) -> Role:
    """The role that has a name."""
    return next(role for role in ROLES.values() if name in role.names)


# ---------------------------------------------------------------------- arguments that our hooks look up
@dataclass
class Wanted:
    """Arguments of one part of a model.

    Attributes:
        required: without which hooks refuse the model.
        optional: which are looked at where they are.
    """

    required: tuple[Role, ...] = ()
    optional: tuple[Role, ...] = ()


class _Part(nn.Module):
    """Stands for a part of a host's model."""

    def __init__(self, what: str, spec: VLMSpec) -> None:
        super().__init__()
        self.what = what
        self.config = SimpleNamespace(**dict.fromkeys(spec.ids, 0))


def wanted(spec: VLMSpec) -> dict[str, Wanted]:
    """What our hooks look up when they are placed, noted while they are placed on stand-ins.

    Args:
        spec: a family with a language model that is cut.

    Returns:
        By part: ``whole model`` (where it is not its own core), ``inner model``, ``tower``, ``text model``, ``layers``.
    """
    found: dict[str, Wanted] = {}

    def look_up(part: Any, roles: Iterable[Role], optional: Iterable[Role] = ()) -> Any:
        known = found.setdefault(part.what, Wanted())
        known.required = tuple(dict.fromkeys((*known.required, *roles)))
        known.optional = tuple(dict.fromkeys((*known.optional, *optional)))
        return SimpleNamespace()

    top, core, tower, text, layer = (
        _Part(what, spec) for what in ("whole model", "inner model", "tower", "text model", "layers")
    )
    below: nn.Module = core
    for name in spec.tower.split(".")[:-1]:
        below.add_module(name, nn.Module())
        below = below.get_submodule(name)
    below.add_module(spec.tower.rpartition(".")[2], tower)
    text.layers = nn.ModuleList([layer])
    attachment: Any = SimpleNamespace(hook=lambda *_: None)
    projector: Any = None
    with _replaced("Arguments", look_up, signatures, decoder_intake):
        decoder_intake.Intake(attachment, spec, core, projector).install(core, top if spec.core else core)
        signatures.Signatures(spec, text, probe=0, first=0, told=())
    return found


@contextmanager
def _replaced(name: str, by: Any, *modules: ModuleType) -> Iterator[None]:
    before = [getattr(module, name) for module in modules]
    try:
        for module in modules:
            setattr(module, name, by)
        yield
    finally:
        for module, value in zip(modules, before):
            setattr(module, name, value)


# ---------------------------------------------------------------------- attributes that our functions read
@dataclass(frozen=True, order=True)
class Read:
    """An attribute that a function reads of one of its values.

    Attributes:
        path: dotted.
        unless: attribute that must be None for the read to happen, or empty.
        having: attribute that must be there for it, or empty.
        default: whether the read goes on without it.
    """

    path: str
    unless: str = ""
    having: str = ""
    default: bool = False


def reads(function: Callable[..., Any], *roots: str) -> tuple[Read, ...]:
    """What a function of ours reads of its arguments or variables.

    Args:
        function: of this project.
        roots: names of the variables, also dotted ones such as ``self.model``.

    Raises:
        NothingRead: not one attribute is read.
    """
    node = _node(function)
    found = tuple(dict.fromkeys(read for root in roots for read in _reads(node, root, "", "")))
    if not found:
        raise NothingRead(f"{function.__qualname__} reads nothing of {' or '.join(roots)}")
    return found


def file_reads(modules: Iterable[ModuleType], *roots: str) -> tuple[Read, ...]:
    """The same for everything in some files of ours.

    Raises:
        NothingRead: not one attribute is read.
    """
    trees = [_tree(str(module.__file__)) for module in modules]
    found = tuple(dict.fromkeys(read for tree in trees for root in roots for read in _reads(tree, root, "", "")))
    if not found:
        raise NothingRead(f"none of our files reads anything of {' or '.join(roots)}")
    return found


def module_reads(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names that a function takes from the module of a host's class, as ``forms.beside(part, "name")``."""
    calls = (node for node in ast.walk(_node(function)) if isinstance(node, ast.Call))
    found = [ast.literal_eval(call.args[1]) for call in calls if dotted(call.func) == "forms.beside"]
    return tuple(dict.fromkeys(found))


def keywords(function: Callable[..., Any], called: str) -> tuple[str, ...]:
    """Names under which a function hands arguments to what it calls by a name of its own.

    Raises:
        NothingRead: it calls nothing of this name, or hands it nothing by name.
    """
    calls = (node for node in ast.walk(_node(function)) if isinstance(node, ast.Call))
    found = [keyword.arg for call in calls if dotted(call.func) == called for keyword in call.keywords if keyword.arg]
    if not found:
        raise NothingRead(f"{function.__qualname__} hands {called} nothing by name")
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=64)
def _tree(path: str) -> ast.Module:
    with open(path, encoding="utf-8") as file:
        return ast.parse(file.read())


def _node(function: Any) -> ast.AST:
    """The definition of a function or lambda of ours."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r} is no function")
    code = function.__code__
    for node in ast.walk(_tree(code.co_filename)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            lines = [node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))]
            if min(lines) == code.co_firstlineno and getattr(node, "name", "<lambda>") == code.co_name:
                return node
    raise NothingRead(f"the source of {function.__qualname__} is not found in {code.co_filename}")


def _reads(node: ast.AST, root: str, unless: str, having: str) -> Iterator[Read]:
    """Reads below a node; branches that ask for an attribute first are marked with it."""
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from _reads(node.test, root, unless, having)
        missing, present = _asked(node.test, root)
        branches = [part if isinstance(part, list) else [part] for part in (node.body, node.orelse)]
        for inner in branches[0]:
            yield from _reads(inner, root, missing or unless, present or having)
        for inner in branches[1]:
            yield from _reads(inner, root, unless, having)
        return
    if isinstance(node, ast.Attribute):
        path = _path(node)
        if path.startswith(f"{root}."):
            yield Read(path.removeprefix(f"{root}."), unless, having)
            return
    if isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
        owner, name = dotted(node.args[0]), node.args[1]
        if (owner == root or owner.startswith(f"{root}.")) and isinstance(name, ast.Constant):
            path = f"{owner}.{name.value!s}".removeprefix(f"{root}.")
            yield Read(path, unless, having, len(node.args) > 2 or dotted(node.func) == "hasattr")
            return
    for part in ast.iter_child_nodes(node):
        yield from _reads(part, root, unless, having)


def _path(node: ast.AST) -> str:
    """The same as `dotted`, with ``a.b[].c`` for an attribute of an element."""
    if isinstance(node, ast.Subscript):
        owner = _path(node.value)
        return f"{owner}[]" if owner else ""
    if isinstance(node, ast.Attribute):
        owner = _path(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return dotted(node)


def _asked(test: ast.expr, root: str) -> tuple[str, str]:
    """The attribute that a condition wants to be None, and the one that it wants to be there."""
    missing = present = ""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is):
            path = dotted(node.left)
            if path.startswith(f"{root}."):
                missing = path.removeprefix(f"{root}.")
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr"):
            owner, name = node.args[:2]
            present = str(name.value) if dotted(owner) == root and isinstance(name, ast.Constant) else present
    return missing, present


# ---------------------------------------------------------------------- calls of the host's mask functions
@dataclass(frozen=True)
class MaskCall:
    """A call of one of the host's mask functions by ours.

    Attributes:
        function: its name.
        count: how many arguments it got by position.
        names: the others.
    """

    function: str
    count: int
    names: tuple[str, ...]


class _Cache:
    """Stands for a cache that holds nothing yet."""

    layers = ()

    def get_mask_sizes(self, count: int, layer: int) -> tuple[int, int]:
        return count, 0

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


def mask_calls(
    kind: str, rule: BlockRule | None, functions: dict[str, Signature], table: dict[str, str]
) -> tuple[list[MaskCall], str | None]:
    """Runs our `build_mask` on a stand-in for the host's functions.

    Args:
        kind: layer type.
        rule: how blocks enter, or None.
        functions: every function of the host's module by name.
        table: names of its mask functions by layer type.

    Returns:
        The calls that it made, and what it could not find, or None.
    """
    calls: list[MaskCall] = []
    module = ModuleType("transformers.masking_utils")
    for name, signature in functions.items():
        setattr(module, name, _stand_in(name, signature, calls))
    known = {layer: getattr(module, name) for layer, name in table.items() if name in functions}
    module.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING = known  # type: ignore[attr-defined]
    top = ModuleType("transformers")
    top.masking_utils = module  # type: ignore[attr-defined]
    names = ("transformers", "transformers.masking_utils")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(zip(names, (top, module)))
    hidden, config = torch.zeros(1, 2, 1), SimpleNamespace(sliding_window=2, attention_chunk_size=2)
    blocks = None if rule is None else torch.zeros(1, 2, dtype=torch.int64)
    try:
        for explicit in (False, True):
            for cache in (None, _Cache()):
                masks.build_mask(config, kind, hidden, None, cache, 0, blocks, rule, explicit=explicit)
    except UnsupportedModel as problem:  # it speaks of the version that is installed
        return calls, str(problem).replace(f"transformers {hosts.version_of('transformers')}", "the release")
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before
    if not calls:
        raise NothingRead(f"build_mask calls no function of the host for layers of type {kind}")
    return calls, None


def _stand_in(name: str, signature: Signature, calls: list[MaskCall]) -> Callable[..., Any]:
    """A function that notes its calls.

    Its signature has the host's names, and the first name of every role that the host's does not have, so that our code
    calls it and what is missing shows by name.
    """

    def stand_in(*args: Any, **given: Any) -> Any:
        calls.append(MaskCall(name, len(args), tuple(given)))
        return torch.zeros(1, 1, 2, 2, dtype=torch.bool)

    new = [role.names[0] for role in ROLES.values() if not set(role.names) & set(signature.names)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, keyword) for n in dict.fromkeys((*signature.names, *new))]
    stand_in.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    stand_in.__name__, stand_in.__module__ = name, "transformers.masking_utils"
    return stand_in
