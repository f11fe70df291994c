"""Calls that reach every row of the tile table, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlmtok.kernels import (
    triton_columns,
    triton_common,
    triton_cover,
    triton_determinant,
    triton_duplicates,
    triton_energy,
    triton_greedy,
    triton_match,
    triton_merge,
    triton_merge_grad,
    triton_order,
    triton_received,
    triton_transition,
)
from vlmtok.kernels.table import LIMIT_GREEDY, TILES, Tile

HALF, FULL, LONG, BOOL = torch.bfloat16, torch.float32, torch.int64, torch.bool


TIGHT = (
    "match 16-bit <= 64, 528 programs",
    "match 16-bit <= 64, 0 programs",
    "match 16-bit <= any, 132 programs",
    "match 32-bit <= any, 0 programs",
    "match_masked 16-bit <= 128, 132 programs",
    "energy 16-bit <= 64, 528 programs, paper",
    "energy 16-bit <= 64, 0 programs, elu",
    "energy 32-bit <= any, 0 programs, elu",
    "order 64-bit <= 64, 0 programs, mode 3",
    "greedy_select 32-bit <= 1024, 0 programs, max cosine",
    "greedy_select 32-bit <= 16384, 0 programs, max l2",
    "greedy_cover 32-bit <= 16384, 132 programs, table",
    "greedy_cover 32-bit <= 16384, 0 programs, weights",
    "determinant 32-bit <= 2048, 0 programs",
    "determinant_round 32-bit <= 16384, 0 programs, table",
    "determinant_round 32-bit <= 16384, 0 programs, features",
    "drop_duplicates, lengths",
    "merge_rows 32-bit <= 1024, 0 programs, mean",
    "merge_rows 32-bit <= any, 0 programs, weights",
    "merge_rows 32-bit <= 1024, 0 programs, grad",
    "transition_stats 32-bit <= any, 0 programs",
    "received_attention 16-bit <= 64, 0 programs, bias",
    "causal_column_sums 16-bit <= 64, 0 programs, plain",
    "causal_column_sums 16-bit <= 128, 0 programs, four sets",
    "causal_column_sums 16-bit <= 256, 0 programs, padded",
    "causal_column_sums 32-bit <= 256, 0 programs, added",
    "row_scale 16-bit, 64",
    "row_scale 32-bit, 1024",
    "row_scale 16-bit, 1024, guided",
    "merge_rows 32-bit <= any, 0 programs, pairs",
)
"""One of every kernel, and those that come closest to a limit: compiled in every run. The rest: VLMTOK_AOT=every."""


def meta(*shape: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _batch(row: Tile, n: int) -> int:
    """Pictures enough for the row's number of programs."""
    return max(1, -(-row.programs * 64 // n))


def _match(row: Tile) -> None:
    n, dtype, d = 576, HALF if row.width == 2 else FULL, min(row.size, 1024)
    x = meta(_batch(row, n), n, d, dtype=dtype)
    triton_match.match_max(x, x[:, :-1])


def _match_masked(row: Tile) -> None:
    n, dtype, d = 576, HALF if row.width == 2 else FULL, min(row.size, 1024)
    x = meta(_batch(row, n), n, d, dtype=dtype)
    ranks = meta(*x.shape[:2], dtype=LONG)
    triton_match.match_max(x, x, rank_a=ranks, rank_b=ranks, exclude_diag=True, valid_b=meta(*x.shape[:2], dtype=BOOL))


def _energy(row: Tile, kind: str = "elu") -> None:
    n, dtype, d = 576, HALF if row.width == 2 else FULL, min(row.size, 1024)
    triton_energy.energy(meta(_batch(row, n), n, d, dtype=dtype), margin=0.4, kind=kind)


def _order(row: Tile, mode: int) -> None:
    n, r = row.size, row.size // 8
    keep, src, dst, score = meta(1, n - r, dtype=LONG), meta(1, r, dtype=LONG), meta(1, r, dtype=LONG), meta(1, n)
    triton_order._order(
        score, keep, src, mode, dst=dst, partner=meta(1, n, dtype=LONG), minus=score, protected=meta(1, n, dtype=BOOL),
        others=n, ascending=True,
    )  # fmt: skip


def _greedy(row: Tile, rule: str = "max", metric: str = "cosine") -> None:
    n = row.size
    valid = meta(2, n, dtype=BOOL)
    triton_greedy.greedy_select(
        meta(2, n, 64, dtype=HALF), 8, meta(2, dtype=LONG), rule=rule, metric=metric, valid=valid
    )


def _cover(row: Tile, how: str) -> None:
    n = 2880 if row.programs else 576
    table = meta(_batch(row, n), n, n + 24, dtype=HALF if how == "halves" else FULL)
    weight = meta(*table.shape[:2]) if how == "weights" else None
    triton_cover.greedy_cover(table, 1, weight=weight, late=meta(*table.shape[:2], dtype=LONG))


def _determinant(row: Tile, n: int, masked: bool) -> None:
    relevance, valid = (meta(2, n), meta(2, n, dtype=BOOL)) if masked else (None, None)
    triton_determinant.greedy_determinant(meta(2, n, 64, dtype=HALF), 1, relevance=relevance, valid=valid)


def _merge(row: Tile, how: str) -> None:
    d = min(row.size, 4096)
    x, size, plan = meta(2, 577, d, dtype=HALF), meta(2, 577), [meta(2, k, dtype=LONG) for k in (519, 58, 58)]
    weights = {"keep_weight": meta(2, 519), "src_weight": meta(2, 58)}
    if how == "grad":
        triton_merge_grad.merge_rows_grad(x[:, :519], *plan, *weights.values(), 577)
    elif how == "pairs":
        triton_merge.merge_rows_biased(x, size, *plan, prefix=0, importance=meta(2, 577))
    else:
        triton_merge.merge_rows(x, size, *plan, prefix=0, **(weights if how == "weights" else {}))


def _transition(row: Tile) -> None:
    x = meta(64, min(row.size, 4096), dtype=HALF)
    triton_transition.transition_stats(x, x)


def _received(row: Tile, bias: bool) -> None:
    q = meta(2, 16, 577, row.size, dtype=HALF if row.width == 2 else FULL)
    triton_received.received_attention(q, q, scale=0.1, bias=meta(2, 1, 1, 577, dtype=q.dtype) if bias else None)


def _columns(row: Tile, how: str) -> None:
    """The kinds of causality, and one or several sets of rows."""
    dtype, n = HALF if row.width == 2 else FULL, 640
    q, k = meta(2, 16, 577, row.size, dtype=dtype), meta(2, 4, n, row.size, dtype=dtype)
    at, some = meta(2, 577, dtype=LONG), meta(2, 64, dtype=BOOL)
    more = {
        "plain": {},
        "padded": {"at": at, "valid": meta(2, n, dtype=BOOL), "sets": [None, some]},
        "seen": {"at": at, "mask": meta(2, 1, n, n, dtype=BOOL)},
        "added": {"at": at, "mask": meta(1, 1, n, n, dtype=dtype), "cap": 50.0, "sets": [None, some, some]},
        "four sets": {"at": at, "valid": meta(2, n, dtype=BOOL), "cap": 50.0, "sets": [None, some, some, some]},
    }[how]
    triton_columns.causal_column_sums(q, k, scale=0.1, **more)


def cases() -> dict[str, tuple[Tile | None, Callable[[], Any]]]:
    """Name to (the row that the call must use, the call)."""
    found: dict[str, tuple[Tile | None, Callable[[], Any]]] = {}

    def add(row: Tile, what: str, function: Callable[..., Any], *args: Any) -> None:
        name = f"{row.op} {8 * row.width}-bit <= {row.size if row.size < 1 << 20 else 'any'}, {row.programs} programs"
        found[name + what] = (row, lambda: function(row, *args))

    for row in TILES:
        if row.op == "match":
            add(row, "", _match)
        elif row.op == "match_masked":
            add(row, "", _match_masked)
        elif row.op == "energy":
            for kind in ("elu", "paper", "gaussian") if row.m == 128 else ("elu",):
                add(row, f", {kind}", _energy, kind)
        elif row.op == "order":
            for mode in (0, 1, 3) if row.n == 64 else (0,) if row.n <= 1024 else ():
                add(row, f", mode {mode}", _order, mode)
        elif row.op == "greedy_select":
            rules = (
                (("max", "cosine"), ("sum", "cosine"), ("max", "l2")) if row.n == LIMIT_GREEDY else (("max", "cosine"),)
            )
            for rule, metric in rules:
                add(row, f", {rule} {metric}", _greedy, rule, metric)
        elif row.op == "greedy_cover":
            for how in ("table", "weights", "halves"):
                add(row, f", {how}", _cover, how)
        elif row.op == "determinant":
            add(row, "", _determinant, row.size, True)
        elif row.op == "determinant_round":
            add(row, ", table", _determinant, 4096, False)
            add(row, ", features", _determinant, row.size, True)
        elif row.op == "merge_rows":
            for how in ("mean", "weights", "pairs", "grad"):
                add(row, f", {how}", _merge, how)
        elif row.op == "transition_stats":
            add(row, "", _transition)
        elif row.op == "received_attention":
            for bias in (False, True):
                add(row, ", bias" if bias else "", _received, bias)
        elif row.op == "causal_column_sums":
            for how in ("plain", "padded", "seen", "added", "four sets"):
                add(row, f", {how}", _columns, how)
    for width, dtype in ((16, HALF), (32, FULL)):
        for d in (64, 128, 1024):
            x = meta(2, 577, d, dtype=dtype)
            found[f"row_scale {width}-bit, {d}"] = (None, lambda x=x: triton_common.row_scale(x))
            found[f"row_scale {width}-bit, {d}, guided"] = (
                None,
                lambda x=x: triton_common.row_scale(x, x[:, 0], meta(2, 577)),
            )
    # Rows picked by index, and ranks by score.
    keys, scores, protected = meta(64, 60, 64, dtype=HALF), meta(64, 60), meta(64, 60, dtype=BOOL)
    found["energy_match"] = (None, lambda: triton_order.energy_match(keys, 8, margin=0.4))
    found["complete_match"] = (None, lambda: triton_order.complete_match(keys, scores, 8, protected))
    # Lists of rows, of one length and of several.
    for name, valid in (("drop_duplicates", None), ("drop_duplicates, lengths", meta(2, 64, dtype=BOOL))):
        found[name] = (None, lambda valid=valid: triton_duplicates.drop_duplicates(
            meta(2, 64, 64, dtype=HALF), meta(2, 64, dtype=LONG), 56, valid=valid))  # fmt: skip
    return found
