"""The ops as opaque `torch.library` ops: one node under torch.compile, shapes on meta tensors, a FLOP formula.

Every op ends in ``path``: ``"torch"`` runs the definition, ``"triton"`` the kernel, ``""`` the definition on a CPU and
the kernel on a CUDA or HIP device. The public functions choose; see `vlmtok.kernels.dispatch`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .flop_formulas import register_once_counted
from .shapes import SHAPES

_LIBRARY = torch.library.Library("vlmtok", "FRAGMENT")

# The module of the launcher is imported when it first runs: it is what imports triton.
LAUNCHERS = {
    "match_max": "triton_match",
    "energy": "triton_energy",
    "bipartite_match": "triton_order",
    "energy_match": "triton_order",
    "complete_match": "triton_order",
    "guided_match": "triton_order",
    "merge_rows": "triton_merge",
    "merge_rows_biased": "triton_merge",
    "merge_rows_grad": "triton_merge_grad",
    "greedy_select": "triton_greedy",
    "greedy_cover": "triton_cover",
    "greedy_cover_cosine": "triton_cover",
    "greedy_determinant": "triton_determinant",
    "drop_duplicates": "triton_duplicates",
    "transition_stats": "triton_transition",
    "received_attention": "triton_received",
    "causal_column_sums": "triton_columns",
}
_MERGE = (
    "Tensor x, Tensor size, Tensor keep, Tensor src, Tensor dst, *, Tensor? keep_weight=None, Tensor? src_weight=None, "
    "Tensor? importance=None, SymInt prefix=0, SymInt suffix=0, str path='') -> ("
)
SCHEMAS = {
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
    "greedy_cover": "Tensor table, SymInt k, *, Tensor? weight=None, Tensor? late=None, str path='') -> "
    "(Tensor, Tensor",
    "greedy_cover_cosine": "Tensor x, SymInt k, *, Tensor? weight=None, Tensor? valid=None, str path='') -> "
    "(Tensor, Tensor",
    "greedy_determinant": "Tensor x, SymInt k, *, Tensor? relevance=None, Tensor? valid=None, str path='') -> "
    "(Tensor, Tensor",
    "drop_duplicates": "Tensor x, Tensor order, SymInt k, *, SymInt step=8, Tensor? valid=None, str path='') -> "
    "(Tensor",
    "transition_stats": "Tensor x, Tensor y, *, str path='') -> (Tensor, Tensor",
    "attention_rows": "Tensor q, Tensor k, *, float scale, Tensor? bias=None, float? cap=None, str path='') -> (Tensor",
    "received_attention": "Tensor q, Tensor k, *, float scale, Tensor? bias=None, SymInt chunk=256, str path='') "
    "-> (Tensor",
    "causal_column_sums": "Tensor q, Tensor k, *, float scale, Tensor? at=None, Tensor? valid=None, Tensor? mask=None, "
    "float? cap=None, Tensor?[] sets, str path='') -> (Tensor",
}


def _implementation(name: str) -> Callable[..., Any]:
    definition = getattr(reference, name)

    def run(*args: Any, path: str = "", **kwargs: Any) -> Any:
        on_triton = path == "triton" or (path == "" and args[0].device.type == "cuda" and name in LAUNCHERS)
        if on_triton:
            launcher = importlib.import_module(f".{LAUNCHERS[name]}", __package__)
            return getattr(launcher, name)(*args, **kwargs)
        with torch.no_grad():
            result = definition(*args, **kwargs)
        # The registered shapes promise contiguous outputs; a definition may return a view.
        return result.contiguous() if isinstance(result, Tensor) else tuple(x.contiguous() for x in result)

    run.__name__ = name
    return run


for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(f"{_name}({_schema})", tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _implementation(_name), _key)
    torch.library.register_fake(f"vlmtok::{_name}", SHAPES[_name], lib=_LIBRARY)


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
    register_once_counted()
    return getattr(torch.ops.vlmtok, name)(*args, path=path, **kwargs)
