"""Cases of greedy choices: k of n rows, one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference.determinant import has_table, pictures_at_a_time
from ..reference.duplicates import lengths
from ..table import LIMIT_DETERMINANT
from .drawing import features, orders, shares
from .floors import Case, Rival


def farthest_sum(n: int, k: int, width: int, batch: int) -> Case:
    """`greedy_select` by the sum of similarities (ToDRE): a round reads a row of the products."""

    def drawn(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return features(device, dtype, batch, n, width), torch.zeros(batch, dtype=torch.int64, device=device)

    return Case(
        "greedy_select", f"N={n}, k={k}, C={width}", batch, drawn,
        lambda m, x, start: m.greedy_select(x, k, start, rule="sum"),
        2 * batch * n * width + 4 * batch * n * (n + k), 2 * batch * n * n * width, 3, (k, 4 * n), unrolls=True,
    )  # fmt: skip


def farthest_point(n: int, k: int, width: int, batch: int) -> Case:
    """`greedy_select` by Euclidean distance in fp32, which farthest point sampling is."""
    case = farthest_sum(n, k, width, batch)
    return replace(
        case, what=f"{case.what}, Euclidean, fp32", dtype=torch.float32,
        bytes=4 * batch * n * width + 4 * batch * n * (n + k),
        run=lambda m, x, start: m.greedy_select(x, k, start, metric="l2"), launches=2, rivals=(_sampling(k),),
    )  # fmt: skip


def _sampling(k: int) -> Rival:
    """Farthest point sampling by Euclidean distance (torch-cluster, MIT), from the first row of each picture."""

    def run(module: Any, x: Tensor, start: Tensor) -> Tensor:
        batch, n, _ = x.shape
        picture = torch.arange(batch, device=x.device).repeat_interleave(n)
        # It takes ceil(ratio n) points: half a point less than k cannot be rounded to k + 1.
        chosen: Tensor = module.fps(x.flatten(0, 1), picture, ratio=(k - 0.5) / n, random_start=False)
        return chosen.view(batch, k) - n * torch.arange(batch, device=x.device)[:, None]

    return Rival("torch_cluster", "torch-cluster", run, devices=("cpu", "cuda"))


def cover_cosine(n: int, k: int, width: int, batch: int) -> Case:
    """`greedy_cover_cosine` with weights (SCOPE). By lazy evaluation a round need not read more than the row chosen."""

    def drawn(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return features(device, dtype, batch, n, width), shares(device, batch, n)

    # Two launches a round; before them rows of length one, products, first gains and who follows behind.
    return Case(
        "greedy_cover_cosine", f"N={n}, k={k}, C={width}", batch, drawn,
        lambda m, x, weight: m.greedy_cover_cosine(x, k, weight=weight),
        2 * batch * n * width + 4 * batch * n * (n + k) + 4 * batch * n, 2 * batch * n * n * width, 2 * k + 34,
        (k, 4 * n), unrolls=True,
    )  # fmt: skip


def cover_table(n: int, k: int, targets: int, batch: int) -> Case:
    """`greedy_cover` of a table that is given (MMTok: of the picture's tokens, and of the words of a question)."""

    def drawn(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (shares(device, batch, n, targets),)

    # Two launches a round; before them first gains and who follows behind.
    return Case(
        "greedy_cover", f"N={n}, k={k}, {targets} targets, fp32", batch, drawn,
        lambda m, table: m.greedy_cover(table, k),
        4 * batch * n * targets + 12 * batch * k, 0, 2 * k + 9, (k, 4 * targets), unrolls=True, dtype=torch.float32,
    )  # fmt: skip


def determinant(n: int, k: int, width: int, batch: int) -> Case:
    """`greedy_determinant` with relevance (CDPruner). A round reads the factors of all before it: half, on average."""

    def drawn(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return features(device, dtype, batch, n, width), shares(device, batch, n)

    size, factors = 2 * batch * n * width, 2 * batch * n * k * k
    table, program = has_table(n), n <= LIMIT_DETERMINANT
    groups = -(-batch // pictures_at_a_time(batch, n))
    return Case(
        "greedy_determinant", f"N={n}, k={k}, C={width}", batch, drawn,
        lambda m, x, relevance: m.greedy_determinant(x, k, relevance=relevance),
        (1 if table else k) * size + factors, 2 * batch * n * width * (n if table else k),
        1 + groups * (table + (1 if program else k + 1)), (k, 2 * n * k) if program else (k, 0), unrolls=True,
    )  # fmt: skip


def duplicates(n: int, k: int, width: int, batch: int) -> Case:
    """`drop_duplicates` (VisPruner): k of n are left, 8 fewer a round."""

    def lists(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return features(device, dtype, batch, n, width), orders(device, batch, n)

    lists_left = lengths(n, k, 8)
    rounds = len(lists_left)
    flops = sum(2 * batch * ((left + 1) // 2) * (left // 2) * width for left in lists_left)
    return Case(
        "drop_duplicates", f"N={n}, k={k}, C={width}", batch, lists,
        lambda m, x, order: m.drop_duplicates(x, k=k, order=order), 2 * batch * n * width + 8 * batch * (n + k),
        flops, 6 + 2 * rounds, (rounds, 0), unrolls=True,
    )  # fmt: skip
