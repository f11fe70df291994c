"""What a class shows of how it works: whom it calls with what, what it gives back, which of its parts have weights."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .classes import Auto, External, HostClass, Reader, dotted

WEIGHTED = frozenset({"Linear", "Conv1d", "Conv2d", "Embedding", "LayerNorm", "RMSNorm", "GroupNorm", "Bilinear"})
"""Modules of torch with weights."""


def strings(node: ast.AST) -> set[str]:
    """All texts in a piece of source."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def calls_of(cls: HostClass, target: str) -> list[ast.Call]:
    """Calls of something, as ``self.name``, by the nearest class that calls it."""
    for owner in cls.lineage:
        found = [node for node in ast.walk(owner.node) if isinstance(node, ast.Call) and dotted(node.func) == target]
        if found:
            return found
    return []


def results_of(method: ast.FunctionDef, target: str) -> set[str]:
    """Variables of a method that hold what a call gave."""
    found: set[str] = set()
    for node in ast.walk(method):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        if isinstance(node.value, ast.Call) and dotted(node.value.func) == target:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for part in targets if isinstance(part, ast.Name)}
    return found


def loop_calls(cls: HostClass, over: str) -> list[ast.Call]:
    """Calls, in forward, of the variable of a loop over something."""
    method = cls.method("forward")
    found: list[ast.Call] = []
    for loop in ast.walk(method) if method is not None else ():
        if isinstance(loop, ast.For) and any(dotted(node) == over for node in ast.walk(loop.iter)):
            names = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
            calls = (node for node in ast.walk(loop) if isinstance(node, ast.Call))
            found += [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]
    return found


def called_in_order(cls: HostClass, function: ast.AST, depth: int = 2) -> Iterator[str]:
    """Attributes of `self` that a function calls, methods looked into, in the order in which the calls run."""
    for part in ast.iter_child_nodes(function):
        yield from called_in_order(cls, part, depth)
        if isinstance(part, ast.Call) and dotted(part.func).startswith("self."):
            name = dotted(part.func).removeprefix("self.")
            yield name
            method = cls.method(name)
            if method is not None and depth:
                yield from called_in_order(cls, method, depth - 1)


def returned(cls: HostClass) -> list[HostClass]:
    """Classes of the library that forward gives back."""
    method = cls.method("forward")
    if method is None:
        return []
    reader = Reader(next(owner for owner in cls.lineage if method in owner.node.body), method)
    values = (node.value for node in ast.walk(method) if isinstance(node, ast.Return))
    found = [kind for value in values for kind in reader.made(value)]
    return [kind for kind in dict.fromkeys(found) if isinstance(kind, HostClass)]


def reached(owner: HostClass, name: str, depth: int = 5) -> bool:
    """Whether an instance of a class of this name is made somewhere below."""
    if owner.name == name:
        return True
    below = [kind for cls in owner.lineage for attribute in cls.own for kind in cls.made_of(attribute)]
    inner = [kind for kind in dict.fromkeys(below) if isinstance(kind, HostClass) and kind is not owner]
    return depth > 0 and any(reached(kind, name, depth - 1) for kind in inner)


def weighted(cls: HostClass) -> list[str]:
    """Submodules of a class that have weights."""
    names = (name for owner in cls.lineage for name in owner.own)
    return [name for name in dict.fromkeys(names) if any(map(_has_weights, cls.made_of(name)))]


def _has_weights(kind: HostClass | External | Auto, depth: int = 3) -> bool:
    if isinstance(kind, External):
        return kind.name.rpartition(".")[2] in WEIGHTED
    if isinstance(kind, Auto) or not depth:
        return True
    for owner in kind.lineage:
        if any(dotted(base).rpartition(".")[2] in WEIGHTED for base in owner.node.bases):
            return True
        for name, values in owner.own.items():
            calls = (value for value, _ in values if isinstance(value, ast.Call))
            if any(dotted(call.func).rpartition(".")[2] == "Parameter" for call in calls):
                return True
            if any(_has_weights(inner, depth - 1) for inner in owner.made_of(name)):
                return True
    return False
