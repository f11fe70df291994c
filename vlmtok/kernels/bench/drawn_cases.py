"""Cases of ops that nobody wrote a case for: inputs from the names of their arguments, costs counted on meta tensors.

An op that is registered with a kernel appears in the benchmark without an edit. Sizes follow from its kind: choices of
k rows (an int `k`), attention (`q` and `k`), and rows of a tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import library, ops
from ..dispatch import HAS_TRITON, use
from .floors import Case


@dataclass(frozen=True)
class Extent:
    """Sizes that inputs are drawn in: batch, rows, width, heads, how many are chosen or merged; and in words."""

    batch: int
    n: int
    width: int
    heads: int
    few: int
    what: str


def _choices(small: bool) -> list[Extent]:
    sizes = [(2, 64, 32, 8)] if small else [(1, 576, 4096, 57), (8, 576, 4096, 57), (1, 2880, 4096, 288)]
    return [Extent(batch, n, c, 1, k, f"N={n}, k={k}, C={c}") for batch, n, c, k in sizes]


def _attentions(small: bool) -> list[Extent]:
    sizes = [(2, 32, 16, 2)] if small else [(1, 576, 64, 16), (32, 576, 64, 16), (1, 4096, 128, 32)]
    return [Extent(batch, n, d, heads, n // 10, f"N={n}, {heads} heads of {d}") for batch, n, d, heads in sizes]


def _rows(small: bool) -> list[Extent]:
    sizes = [(2, 72, 1024)] if small else [(batch, 576, 1024) for batch in (1, 32, 256)]
    return [Extent(batch, n, c, 1, n // 10, f"N={n}, C={c}") for batch, n, c in sizes]


_Draw = Callable[[Extent, torch.device, torch.dtype], Any]


def _normal(*names: str) -> _Draw:
    return lambda e, device, dtype: torch.randn(*(getattr(e, name) for name in names), device=device, dtype=dtype)


def _uniform(*names: str) -> _Draw:
    return lambda e, device, dtype: torch.rand(
        *(getattr(e, name) for name in names), device=device, dtype=torch.float32
    )


def _places(chosen: bool) -> _Draw:
    """Rows that go (`few`), or those that stay."""

    def draw(e: Extent, device: torch.device, dtype: torch.dtype) -> Tensor:
        rows = torch.arange(e.n, device=device).expand(e.batch, -1)
        return (rows[:, : e.few] if chosen else rows[:, e.few :]).contiguous()

    return draw


_HEADS = ("batch", "heads", "n", "width")
_SCORES = ("importance", "weight", "quality", "relevance", "scores")
DRAWS: dict[tuple[str, str], _Draw] = {
    **{(name, "Tensor"): _normal("batch", "n", "width") for name in ("x", "y", "a", "b", "metric")},
    **{(name, "Tensor"): _uniform("batch", "n") for name in _SCORES},
    ("table", "Tensor"): _uniform("batch", "n", "n"),
    ("query", "Tensor"): _normal("batch", "width"),
    ("q", "Tensor"): _normal(*_HEADS),
    ("k", "Tensor"): _normal(*_HEADS),
    ("start", "Tensor | None"): lambda e, device, _: torch.zeros(e.batch, dtype=torch.int64, device=device),
    ("size", "Tensor"): lambda e, device, _: torch.ones(e.batch, e.n, device=device, dtype=torch.float32),
    ("keep", "Tensor"): _places(chosen=False),
    ("src", "Tensor"): _places(chosen=True),
    ("dst", "Tensor"): lambda e, device, _: torch.randint(0, e.n - e.few, (e.batch, e.few), device=device),
    ("k", "int"): lambda e, *_: e.few,
    ("r", "int"): lambda e, *_: e.few,
    ("scale", "float"): lambda e, *_: e.width**-0.5,
    ("margin", "float"): lambda *_: 0.45,
}
"""How an argument without a default is drawn, by its name and annotation."""


@dataclass(frozen=True)
class _Call:
    """One op on drawn inputs; scalars are in place, tensors come with the call."""

    op: str
    arguments: tuple[tuple[str, str], ...]
    extent: Extent

    def make(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        return tuple(DRAWS[argument](self.extent, device, dtype) for argument in self.arguments)

    def run(self, module: Any, *drawn: Any) -> Any:
        signature = inspect.signature(getattr(ops, self.op)).parameters
        named = {name: value for (name, _), value in zip(self.arguments, drawn)}
        by_word = {name for name in named if signature[name].kind is inspect.Parameter.KEYWORD_ONLY}
        placed = [value for name, value in named.items() if name not in by_word]
        return getattr(module, self.op)(*placed, **{name: named[name] for name in by_word})


def required(op: str) -> tuple[tuple[str, str], ...]:
    """Name and annotation of the arguments of an op that have no default."""
    parameters = inspect.signature(getattr(ops, op)).parameters.values()
    return tuple((p.name, str(p.annotation)) for p in parameters if p.default is inspect.Parameter.empty)


def lacking(known: set[str]) -> dict[str, str]:
    """Public ops with a kernel that the benchmark leaves out.

    Args:
        known: ops that have a case written for them.

    Returns:
        Why, by op: arguments that `DRAWS` does not know, or no triton to count launches with.
    """
    if not HAS_TRITON:
        return dict.fromkeys(_registered(known), _NO_TRITON)
    found = {}
    for op in _registered(known):
        unknown = [f"{name}: {kind}" for name, kind in required(op) if (name, kind) not in DRAWS]
        if unknown:
            found[op] = f"DRAWS of vlmtok/kernels/bench/drawn_cases.py does not know {', '.join(unknown)}"
    return found


def _registered(known: set[str]) -> list[str]:
    return [op for op in ops.__all__ if op in library.LAUNCHERS and op not in known]


_NO_TRITON = "triton is not installed, by which launches of ops without a case of their own are counted"


def drawn_cases(known: set[str], small: bool = False) -> list[Case]:
    """Cases of the public ops with a kernel that have none written for them.

    Args:
        known: ops that have one.
        small: sizes for a processor.

    Returns:
        The cases; ops of `lacking` have none.
    """
    gone = lacking(known)
    return [_case(op, extent) for op in _registered(known) if op not in gone for extent in _sizes(required(op), small)]


def _sizes(arguments: tuple[tuple[str, str], ...], small: bool) -> list[Extent]:
    if ("k", "int") in arguments:
        sizes = _choices(small)
        if ("table", "Tensor") in arguments:
            sizes = [replace(e, what=f"N={e.n}, k={e.few}, table given") for e in sizes]
        return sizes
    return _attentions(small) if ("q", "Tensor") in arguments else _rows(small)


def _case(op: str, extent: Extent) -> Case:
    arguments = required(op)
    call = _Call(op, arguments, extent)
    moved, flops = _costs(call)
    greedy = ("k", "int") in arguments
    # A greedy choice waits for each round, which reads a row of what it compares.
    chain = (extent.few, 4 * extent.n) if greedy else (0, 0)
    launches = _launches(call)
    return Case(op, extent.what, extent.batch, call.make, call.run, moved, flops, launches, chain, unrolls=greedy)


@lru_cache(maxsize=256)
def _costs(call: _Call) -> tuple[int, int]:
    """Bytes of inputs and outputs, each once, and FLOPs by the formula of the op."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = call.make(torch.device("meta"), torch.bfloat16)
    with use("triton"), FlopCounterMode(display=False) as counter:
        outputs = call.run(ops, *inputs)
    tensors = [leaf for leaf in tree_leaves((inputs, outputs)) if isinstance(leaf, Tensor)]
    return sum(x.nbytes for x in tensors), int(counter.get_total_flops())


@lru_cache(maxsize=256)
def _launches(call: _Call) -> int:
    """Launches of the Triton path, counted on meta tensors."""
    from .launches import CountOps

    inputs = call.make(torch.device("meta"), torch.bfloat16)
    with use("triton"), CountOps() as count:
        call.run(ops, *inputs)
    # Widening inputs is spared where tensor cores take them.
    return count.total - count.ops["aten._to_copy.default"]
