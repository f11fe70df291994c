"""Classes of a host as their source shows them: bases, attributes, what attributes are made of, signatures."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from .sources import Module

LISTS = frozenset({"ModuleList", "Sequential", "ModuleDict"})
"""Containers of modules; what is asked about them is asked about their elements."""


REGISTERS = frozenset({"self.register_buffer", "self.register_parameter", "self.add_module"})
"""Calls that set an attribute by its name."""


@dataclass(frozen=True)
class External:
    """A class from outside the library, by its dotted name as written (``nn.Linear``)."""

    name: str


@dataclass(frozen=True)
class Auto:
    """A class that is chosen by a configuration.

    Attributes:
        chooser: ``AutoModel`` or a relative of it.
        field: field of the family's configuration that chooses.
    """

    chooser: str
    field: str


@dataclass(frozen=True)
class Signature:
    """Arguments of a function, without `self`.

    Attributes:
        names: in order, those that have names.
        required: how many have no default.
        kwargs: whether any others are swallowed.
        renamed: old name, new name and last version of names that a decorator still takes.
    """

    names: tuple[str, ...]
    required: int
    kwargs: bool
    renamed: tuple[tuple[str, str, str], ...]


def signature_of(function: ast.FunctionDef, bound: bool = False) -> Signature:
    """The signature of a function.

    Args:
        function: its definition.
        bound: whether the first argument is `self`.
    """
    given = function.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)][bound:]
    only = [argument.arg for argument in given.kwonlyargs]
    required = len(positional) - len(given.defaults) + sum(default is None for default in given.kw_defaults)
    return Signature((*positional, *only), required, given.kwarg is not None, tuple(_renamed(function)))


def _renamed(function: ast.FunctionDef) -> Iterator[tuple[str, str, str]]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and dotted(decorator.func).endswith("deprecate_kwarg"):
            values = [node.value for node in decorator.args if isinstance(node, ast.Constant)]
            named = {k.arg: k.value.value for k in decorator.keywords if isinstance(k.value, ast.Constant)}
            old, until = (*values, None, None)[:2]
            yield str(old), str(named.get("new_name", "nothing")), str(named.get("version", until))


def dotted(node: ast.AST | None) -> str:
    """``a.b.c`` as text, or an empty text for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def host_class(module: Module, node: ast.ClassDef) -> HostClass:
    """The class of a definition, the same object each time.

    Args:
        module: it stands in.
        node: its definition.
    """
    known = module.library.classes
    key = (module.name, node.name)
    if key not in known:
        known[key] = HostClass(module, node)
    found: HostClass = known[key]
    return found


class HostClass:
    """A class of the library; made by `host_class`.

    Args:
        module: it stands in.
        node: its definition.
    """

    def __init__(self, module: Module, node: ast.ClassDef) -> None:
        self.module = module
        self.node = node
        self.name = node.name
        self._made: dict[str, list[HostClass | External | Auto]] = {}

    def __repr__(self) -> str:
        return f"{self.module.name}.{self.name}"

    @cached_property
    def lineage(self) -> tuple[HostClass, ...]:
        """The class and its bases within the library, nearest first."""
        found = [self]
        for base in self.node.bases:
            target = base.value if isinstance(base, ast.Subscript) else base
            place = self.module.find(dotted(target).rpartition(".")[2])
            if place is not None and isinstance(place[1], ast.ClassDef):
                found += host_class(place[0], place[1]).lineage
        return tuple(dict.fromkeys(found))

    @cached_property
    def own(self) -> dict[str, list[tuple[ast.expr | None, ast.FunctionDef | None]]]:
        """Attributes that the class itself sets, with what they are set to and the method that does it."""
        found: dict[str, list[tuple[ast.expr | None, ast.FunctionDef | None]]] = {}
        for node in self.node.body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append((None, None))
                for name, value in _set_on_self(node):
                    found.setdefault(name, []).append((value, node))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.setdefault(node.target.id, []).append((node.value, None))
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        found.setdefault(target.id, []).append((node.value, None))
        return found

    def has(self, name: str) -> bool:
        """Whether an instance has an attribute, as far as the library's own classes say."""
        return any(name in cls.own for cls in self.lineage)

    def fields(self) -> list[str]:
        """Annotated names of the class body, those of the bases first, as a dataclass orders them."""
        found: dict[str, None] = {}
        for cls in reversed(self.lineage):
            annotated = (node.target for node in cls.node.body if isinstance(node, ast.AnnAssign))
            found.update({target.id: None for target in annotated if isinstance(target, ast.Name)})
        return list(found)

    def method(self, name: str) -> ast.FunctionDef | None:
        """A method of the class or of its nearest base that has one."""
        for cls in self.lineage:
            for node in cls.node.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return node
        return None

    def signature(self, name: str = "forward") -> Signature | None:
        """The signature of a method, or None where there is none."""
        method = self.method(name)
        return None if method is None else signature_of(method, bound=True)

    def made_of(self, name: str) -> list[HostClass | External | Auto]:
        """Classes that an attribute, or each element of it, may be an instance of; empty where that is not seen."""
        known = self._made
        if name not in known:
            known[name] = []  # while it is looked for: an attribute may be set from itself
            owner = next((cls for cls in self.lineage if name in cls.own), None)
            values = [] if owner is None else owner.own[name]
            found = [kind for value, where in values for kind in Reader(owner, where).made(value)]
            known[name] = list(dict.fromkeys(found))
        return known[name]

    def literal(self, name: str) -> ast.expr | None:
        """The value of a class attribute."""
        for cls in self.lineage:
            for value, method in cls.own.get(name, ()):
                if method is None and value is not None:
                    return value
        return None


def _set_on_self(method: ast.FunctionDef) -> Iterator[tuple[str, ast.expr | None]]:
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
                same = len(parts) == 1 and parts[0] is target
                yield from ((name, node.value if same else None) for part in parts if (name := _on_self(part)))
        elif isinstance(node, ast.AnnAssign) and (name := _on_self(node.target)):
            yield name, node.value
        elif isinstance(node, ast.Call) and dotted(node.func) in REGISTERS and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value), node.args[1] if len(node.args) > 1 else None
        elif isinstance(node, ast.Call) and node.args and (name := _appended_to(node.func)):
            yield name, node.args[0]


def _appended_to(function: ast.expr) -> str:
    """The list of `self` whose ``append`` this is, or an empty text for anything else."""
    appends = isinstance(function, ast.Attribute) and function.attr == "append"
    return _on_self(function.value) if appends and isinstance(function, ast.Attribute) else ""


def _on_self(node: ast.AST) -> str:
    """The name of an attribute of `self`, or an empty text for anything else."""
    owned = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if owned and isinstance(node, ast.Attribute) else ""


Kinds = list[HostClass | External | Auto]


class Reader:
    """Tells what expressions of one function make.

    Args:
        owner: class that the function is of, or None.
        function: where names are looked up first, or None for the class body.
        module: for functions that are of no class.
        depth: how many calls may still be followed.
    """

    def __init__(
        self,
        owner: HostClass | None,
        function: ast.FunctionDef | None,
        module: Module | None = None,
        depth: int = 6,
    ) -> None:
        self.owner = owner
        self.function = function
        self.module = owner.module if owner is not None else module
        self.depth = depth
        self._open: set[str] = set()  # names that are being looked up: one may be set from itself

    def made(self, node: ast.expr | None) -> Kinds:
        """Classes that the value of an expression, or each element of it, is an instance of."""
        if isinstance(node, ast.IfExp):
            return self.made(node.body) + self.made(node.orelse)
        if isinstance(node, ast.BoolOp):
            return self._all(node.values)
        if isinstance(node, (ast.List, ast.Tuple)):
            return self._all(node.elts)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            return self.made(node.elt)
        if isinstance(node, ast.Starred):
            return self.made(node.value)
        if isinstance(node, ast.Name):
            return self._looking_up(node.id, self.made)
        if isinstance(node, ast.Attribute):
            if _on_self(node):
                return [] if self.owner is None else self.owner.made_of(node.attr)
            below = (kind for kind in self.made(node.value) if isinstance(kind, HostClass))
            return [kind for outer in below for kind in outer.made_of(node.attr)]
        return self._called(node) if isinstance(node, ast.Call) else []

    def _called(self, node: ast.Call) -> Kinds:
        name = dotted(node.func)
        last = name.rpartition(".")[2]
        if last in LISTS:
            return self._all(node.args)
        if last in ("from_config", "_from_config", "from_pretrained"):
            chooser = name.rpartition(".")[0]
            if chooser.startswith("Auto"):
                given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "config")]
                return [Auto(chooser, dotted(given[0]).rpartition(".")[2])] if given else []
            return self.classes(node.func.value) if isinstance(node.func, ast.Attribute) else []
        found = self.classes(node.func)
        if found or not self.depth:
            return found
        # A function that makes it: what it gives back, or a class that it is handed.
        function = None if self.module is None else self.module.find(name)
        if function is not None and isinstance(function[1], ast.FunctionDef):
            inner = Reader(None, function[1], function[0], self.depth - 1)
            returned = inner._all(part.value for part in ast.walk(function[1]) if isinstance(part, ast.Return))
            handed = [kind for part in node.args for kind in self.classes(part)]
            return returned + handed
        return []

    def classes(self, node: ast.expr | None) -> Kinds:
        """Classes that an expression may be."""
        if isinstance(node, ast.IfExp):
            return self.classes(node.body) + self.classes(node.orelse)
        if isinstance(node, ast.Dict):
            return [kind for value in node.values for kind in self.classes(value)]
        if isinstance(node, ast.Subscript):  # a table of classes
            return self.classes(node.value)
        if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] == "partial":
            return self.classes(node.args[0]) if node.args else []
        name = dotted(node)
        if not name or self.module is None:
            return []
        if isinstance(node, ast.Name):
            local = self._looking_up(name, self.classes)
            if local:
                return local
        place = self.module.find(name)
        if place is None:
            # Only dotted names of torch are told from what is not understood.
            return [External(name)] if name.startswith(("nn.", "torch.")) else []
        if isinstance(place[1], ast.ClassDef):
            return [host_class(place[0], place[1])]
        if isinstance(place[1], ast.FunctionDef):
            return []
        return Reader(None, None, place[0], self.depth - 1).classes(place[1]) if self.depth else []

    def _all(self, nodes: Iterable[ast.expr | None]) -> Kinds:
        return [kind for node in nodes for kind in self.made(node)]

    def _looking_up(self, name: str, tell: Callable[[ast.expr], Kinds]) -> Kinds:
        """What is told of everything that a name of the function is set to."""
        if name in self._open:
            return []
        self._open.add(name)
        try:
            return [kind for value in self._local(name) for kind in tell(value)]
        finally:
            self._open.discard(name)

    def _local(self, name: str) -> list[ast.expr]:
        """What a name of the function is set to, its default as an argument included."""
        if self.function is None:
            return []
        found: list[ast.expr] = []
        for node in ast.walk(self.function):
            if isinstance(node, ast.Assign):
                found += [node.value for target in node.targets if isinstance(target, ast.Name) and target.id == name]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                found += [] if node.value is None else [node.value]
        given = self.function.args
        positional = (*given.posonlyargs, *given.args)
        defaults = zip(reversed(positional), reversed(given.defaults))
        keyword = ((a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults) if d is not None)
        found += [default for argument, default in (*defaults, *keyword) if argument.arg == name]
        return [value for value in found if not (isinstance(value, ast.Name) and value.id == name)]
