"""The ops as opaque `torch.library` ops: one node under torch.compile, shapes on meta tensors, a FLOP formula.

Every op ends in ``path``: ``"torch"`` runs the definition, ``"triton"`` the kernel, ``""`` the definition on a CPU and
the kernel on a CUDA or HIP device. The public functions choose; see `vlmtok.kernels.dispatch`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

_LIBRARY = torch.library.Library("vlmtok", "FRAGMENT")

# The module of the launcher is imported when it first runs: it is what imports triton.
_LAUNCHERS = {
    "match_max": "triton_match",
    "energy": "triton_energy",
    "bipartite_match": "triton_order",
    "energy_match": "triton_order",
    "complete_match": "triton_order",
    "guided_match": "triton_order",
    "merge_rows": "triton_merge",
    "merge_rows_biased": "triton_merge",
    "merge_rows_grad": "triton_merge",
    "greedy_select": "triton_greedy",
    "transition_stats": "triton_transition",
    "received_attention": "triton_received",
}
_MERGE = (
    "Tensor x, Tensor size, Tensor keep, Tensor src, Tensor dst, *, Tensor? keep_weight=None, Tensor? src_weight=None, "
    "Tensor? importance=None, SymInt prefix=0, SymInt suffix=0, str path='') -> ("
)
_SCHEMAS = {
    "match_max": "Tensor a, Tensor b, *, Tensor? rank_a=None, Tensor? rank_b=None, bool exclude_diag=False, "
    "Tensor? valid_b=None, str path='') -> (Tensor, Tensor",
    "energy": "Tensor x, *, float margin, float alpha=1.0, str kind='elu', str path='') -> (Tensor",
    "bipartite_match": "Tensor metric, SymInt r, SymInt num_prefix=0, *, str path='') -> (Tensor, Tensor, Tensor",
    "energy_match": "Tensor metric, SymInt r, *, float margin, float alpha=1.0, str kind='elu', "
    "str split='alternate', bool protect=True, str path='') -> (Tensor, Tensor, Tensor",
    "complete_match": "Tensor metric, Tensor? importance, SymInt r, Tensor? protected=None, *, str path='') "
    "-> (Tensor, Tensor, Tensor",
    "guided_match": "Tensor metric, Tensor query, SymInt r, *, str path='') -> (Tensor, Tensor, Tensor, Tensor",
    "merge_rows": _MERGE + "Tensor, Tensor",
    "merge_rows_biased": _MERGE + "Tensor, Tensor, Tensor",
    "merge_rows_grad": "Tensor grad, Tensor keep, Tensor src, Tensor dst, Tensor keep_weight, Tensor src_weight, "
    "SymInt n, SymInt prefix=0, SymInt suffix=0, *, str path='') -> (Tensor",
    "greedy_select": "Tensor x, SymInt k, Tensor start, *, str rule='max', str metric='cosine', Tensor? valid=None, "
    "str path='') -> (Tensor, Tensor",
    "transition_stats": "Tensor x, Tensor y, *, str path='') -> (Tensor, Tensor",
    "attention_rows": "Tensor q, Tensor k, *, float scale, Tensor? bias=None, float? cap=None, str path='') -> (Tensor",
    "received_attention": "Tensor q, Tensor k, *, float scale, Tensor? bias=None, SymInt chunk=256, str path='') "
    "-> (Tensor",
}


def _implementation(name: str) -> Callable[..., Any]:
    definition = getattr(reference, name)

    def run(*args: Any, path: str = "", **kwargs: Any) -> Any:
        on_triton = path == "triton" or (path == "" and args[0].device.type == "cuda" and name in _LAUNCHERS)
        if on_triton:
            launcher = importlib.import_module(f".{_LAUNCHERS[name]}", __package__)
            return getattr(launcher, name)(*args, **kwargs)
        with torch.no_grad():
            result = definition(*args, **kwargs)
        # The shapes below promise contiguous outputs; a definition may return a view.
        return result.contiguous() if isinstance(result, Tensor) else tuple(x.contiguous() for x in result)

    run.__name__ = name
    return run


# ---------------------------------------------------------------------- shapes
def _match_max(a: Tensor, b: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    rows = a.shape[:2]
    return a.new_empty(rows, dtype=torch.float32), a.new_empty(rows, dtype=torch.int64)


def _energy(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _plan(metric: Tensor, r: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, _unused = metric.shape
    new = metric.new_empty
    return (
        new((batch, n - r), dtype=torch.int64),
        new((batch, r), dtype=torch.int64),
        new((batch, r), dtype=torch.int64),
    )


def _complete(metric: Tensor, importance: Tensor | None, r: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _plan(metric, r)


def _guided(metric: Tensor, query: Tensor, r: int, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_plan(metric, r), metric.new_empty(metric.shape[:2], dtype=torch.float32)


def _merge_rows(
    x: Tensor, size: Tensor, keep: Tensor, *_: Any, prefix: int = 0, suffix: int = 0, **__: Any
) -> tuple[Tensor, Tensor]:
    batch, slots = keep.shape
    slots = prefix + slots + suffix
    return x.new_empty(batch, slots, x.shape[2]), size.new_empty(batch, slots)


def _merge_rows_biased(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, total = _merge_rows(x, *args, **kwargs)
    return rows, total, x.new_empty(total.shape)


def _merge_rows_grad(
    grad: Tensor, keep: Tensor, src: Tensor, dst: Tensor, keep_weight: Tensor, src_weight: Tensor, n: int,
    *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    return grad.new_empty(grad.shape[0], n, grad.shape[2])


def _greedy_select(x: Tensor, k: int, start: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return start.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.float32)


def _transition_stats(x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _attention_rows(q: Tensor, k: Tensor, **_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], k.shape[2], dtype=torch.float32)


def _received_attention(q: Tensor, k: Tensor, **_: Any) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[2], dtype=torch.float32)


_SHAPES: dict[str, Callable[..., Any]] = {
    "match_max": _match_max,
    "energy": _energy,
    "bipartite_match": _plan,
    "energy_match": _plan,
    "complete_match": _complete,
    "guided_match": _guided,
    "merge_rows": _merge_rows,
    "merge_rows_biased": _merge_rows_biased,
    "merge_rows_grad": _merge_rows_grad,
    "greedy_select": _greedy_select,
    "transition_stats": _transition_stats,
    "attention_rows": _attention_rows,
    "received_attention": _received_attention,
}

for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(f"{_name}({_schema})", tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation(_name), _key)
    torch.library.register_fake(f"vlmtok::{_name}", _SHAPES[_name], lib=_LIBRARY)


# ---------------------------------------------------------------------- FLOPs
def _pairs(a: Any, rows: int, columns: int) -> int:
    """Multiplications and additions of the cosines of `rows` with `columns` rows; `a` is `[B, N, D]`."""
    return 2 * int(a[0]) * rows * columns * int(a[2])


def _match_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return _pairs(a, a[1], b[1])


def _energy_flops(x: Any, *_: Any, **__: Any) -> int:
    return _pairs(x, x[1], x[1])


def _bipartite_flops(x: Any, r: int, num_prefix: int = 0, *_: Any, **__: Any) -> int:
    odd = (x[1] + num_prefix % 2) // 2
    return _pairs(x, x[1] - odd, odd)


def _energy_match_flops(x: Any, r: int, *_: Any, protect: bool = True, **__: Any) -> int:
    rows, columns = (r, r) if protect else (x[1] - x[1] // 2, x[1] // 2)
    return _energy_flops(x) + _pairs(x, rows, columns)


def _complete_flops(x: Any, importance: Any, r: int, *_: Any, **__: Any) -> int:
    return 2 * _pairs(x, x[1], x[1]) + _pairs(x, r, x[1] - r)


def _guided_flops(x: Any, query: Any, r: int, *_: Any, **__: Any) -> int:
    return _pairs(x, x[1], 1) + _complete_flops(x, None, r)


def _greedy_flops(x: Any, k: int, *_: Any, **__: Any) -> int:
    return _energy_flops(x) if k else 0


def _attention_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return 2 * int(q[0]) * int(q[1]) * int(q[2]) * int(k[2]) * int(q[3])


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


FLOPS: dict[str, Callable[..., int]] = {
    "match_max": _match_flops,
    "energy": _energy_flops,
    "bipartite_match": _bipartite_flops,
    "energy_match": _energy_match_flops,
    "complete_match": _complete_flops,
    "guided_match": _guided_flops,
    "merge_rows": _no_flops,
    "merge_rows_biased": _no_flops,
    "merge_rows_grad": _no_flops,
    "greedy_select": _greedy_flops,
    "transition_stats": _no_flops,
    "attention_rows": _attention_flops,
    "received_attention": _attention_flops,
}
"""Formula of every op, on shapes as FlopCounterMode passes them: 2 x the MACs of the matmuls of its definition."""

_formulas_registered = False


def register_flop_formulas() -> None:
    """Tells `torch.utils.flop_counter` what the ops cost; harmless when repeated.

    Not done at import, because that module imports triton. `vlmtok.kernels` does it at its first op once the module is
    there, for counters that are already counting too.
    """
    global _formulas_registered
    if _formulas_registered:
        return
    _formulas_registered = True
    from torch.utils import flop_counter
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    ops = [getattr(torch.ops.vlmtok, name) for name in FLOPS]
    for op, formula in zip(ops, FLOPS.values()):
        flop_counter.register_flop_formula(op)(formula)
    for active in _get_current_dispatch_mode_stack():
        if counter := getattr(active, "counter", None):  # a FlopCounterMode copies the registry when it is made
            counter.flop_registry.update({op: flop_counter.flop_registry[op] for op in ops})


def call(name: str, *args: Any, path: str, **kwargs: Any) -> Any:
    """Runs an op.

    Args:
        name: of the op.
        args: its tensors and numbers.
        path: ``"torch"`` or ``"triton"``.
        kwargs: its keywords.

    Returns:
        What the op returns.
    """
    if not _formulas_registered and not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        register_flop_formulas()
    return getattr(torch.ops.vlmtok, name)(*args, path=path, **kwargs)
