"""What the opaque ops cost, told to the FLOP counter of torch once there is one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from .reference.determinant import has_table
from .reference.duplicates import lengths


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


def _determinant_flops(x: Any, k: int, *_: Any, **__: Any) -> int:
    rows = x[1] if has_table(x[1]) else k
    return _pairs(x, rows, x[1]) + int(x[0]) * x[1] * k * (k - 1) if k else 0


def _duplicates_flops(x: Any, order: Any, k: int, *_: Any, step: int = 8, **__: Any) -> int:
    return sum(_pairs(x, (left + 1) // 2, left // 2) for left in lengths(order[1], k, step)) if k else 0


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
    "greedy_cover": _no_flops,
    "greedy_cover_cosine": _greedy_flops,
    "greedy_determinant": _determinant_flops,
    "drop_duplicates": _duplicates_flops,
    "transition_stats": _no_flops,
    "attention_rows": _attention_flops,
    "received_attention": _attention_flops,
    "causal_column_sums": _attention_flops,
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


def register_once_counted() -> None:
    """Registers them at the first op that runs once torch's counter is imported."""
    if not _formulas_registered and not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        register_flop_formulas()
