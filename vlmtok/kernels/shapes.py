"""Shapes and dtypes of what the opaque ops return, for tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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


def _greedy_cover(x: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k, dtype=torch.float32)


def _greedy_determinant(x: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k, dtype=torch.float32)


def _drop_duplicates(x: Tensor, order: Tensor, k: int, **_: Any) -> Tensor:
    return order.new_empty(order.shape[0], k)


def _transition_stats(x: Tensor, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _attention_rows(q: Tensor, k: Tensor, **_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], k.shape[2], dtype=torch.float32)


def _received_attention(q: Tensor, k: Tensor, **_: Any) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[2], dtype=torch.float32)


def _causal_column_sums(q: Tensor, k: Tensor, *, sets: Sequence[Tensor | None], **_: Any) -> Tensor:
    return q.new_empty(q.shape[0], len(sets), k.shape[1], k.shape[2], dtype=torch.float32)


SHAPES: dict[str, Callable[..., Any]] = {
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
    "greedy_cover": _greedy_cover,
    "greedy_cover_cosine": _greedy_cover,
    "greedy_determinant": _greedy_determinant,
    "drop_duplicates": _drop_duplicates,
    "transition_stats": _transition_stats,
    "attention_rows": _attention_rows,
    "received_attention": _received_attention,
    "causal_column_sums": _causal_column_sums,
}
