"""The ops and sizes that are reported, with what each must read, multiply and launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference.determinant import has_table, pictures_at_a_time
from ..reference.duplicates import remaining
from ..table import LIMIT_DETERMINANT
from .drawn_cases import drawn_cases, lacking
from .floors import Case, Rival

COLREDUCE = Rival(
    "flash_colreduce", "flash-colreduce", lambda m, q, k: m.flash_colreduce(q, k, reduction="mean").float().mean(1)
)
"""Column means of each head (flash-colreduce, MIT, the kernel of SparseVILA); the mean over heads is torch's."""


def _fps(k: int) -> Rival:
    """Farthest point sampling by Euclidean distance (torch-cluster, MIT), from the first row of each picture."""

    def run(module: Any, x: Tensor, start: Tensor) -> Tensor:
        batch, n, _ = x.shape
        picture = torch.arange(batch, device=x.device).repeat_interleave(n)
        # It takes ceil(ratio n) points: half a point less than k cannot be rounded to k + 1.
        chosen: Tensor = module.fps(x.flatten(0, 1), picture, ratio=(k - 0.5) / n, random_start=False)
        return chosen.view(batch, k) - n * torch.arange(batch, device=x.device)[:, None]

    return Rival("torch_cluster", "torch-cluster", run, devices=("cpu", "cuda"))


def _keys(batch: int, n: int, d: int) -> Callable[[torch.device, torch.dtype], tuple[Tensor]]:
    return lambda device, dtype: (torch.randn(batch, n, d, device=device, dtype=dtype),)


def _tower(batch: int, scale: int = 1) -> list[Case]:
    """One merge layer of CLIP ViT-L/14-336: 576 tokens and CLS, head-mean keys of width 64, a tenth merges."""
    n, d, c, heads, r = 576 // scale, 64, 1024, 16, 58 // scale
    what, pairs, keys = f"CLIP-L/336 layer, N={n}", 2 * batch * n * n * d, 2 * batch * n * d
    many = batch * n >= 132 * 64

    def merge(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        order = torch.rand(batch, n, device=device, dtype=torch.float32).argsort(dim=1)
        x = torch.randn(batch, n + 1, c, device=device, dtype=dtype)
        dst = torch.randint(0, n - r, (batch, r), device=device)
        return x, torch.ones(batch, n + 1, device=device, dtype=torch.float32), order[:, r:], order[:, :r], dst

    def scores(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return *_keys(batch, n, d)(device, dtype), torch.rand(batch, n, device=device, dtype=torch.float32)

    def asked(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return *_keys(batch, n, c)(device, dtype), torch.randn(batch, c, device=device, dtype=dtype)

    def heads_of(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q = torch.randn(batch, heads, n + 1, d, device=device, dtype=dtype)
        return q, q.flip(2)

    plan = 8 * batch * (n + r)
    return [
        Case(
            "bipartite_match", what, batch, _keys(batch, n, d), lambda m, x: m.bipartite_match(x, r, 1),
            keys + plan, pairs // 4, 3 if batch * n // 2 >= 132 * 64 else 2,
        ),
        Case(
            "match_max", f"{what}, complete graph", batch, _keys(batch, n, d),
            lambda m, x: m.match_max(x, x, exclude_diag=True), keys + 12 * batch * n, pairs, 2,
        ),
        Case(
            "complete_match", what, batch, scores, lambda m, x, i: m.complete_match(x, i, r),
            keys + 4 * batch * n + plan, 2 * pairs + 2 * batch * r * (n - r) * d, 5,
        ),
        Case(
            "guided_match", f"{what}, keys of all heads", batch, asked, lambda m, x, query: m.guided_match(x, query, r),
            2 * batch * (n + 1) * c + 4 * batch * n + plan, (4 * n * n + 2 * r * (n - r) + 2 * n) * batch * c, 5,
        ),
        Case(
            "energy", what, batch, _keys(batch, n, d), lambda m, x: m.energy(x, margin=0.45),
            keys + 4 * batch * n, pairs, 2 if many else 1,
        ),
        Case(
            "energy_match", what, batch, _keys(batch, n, d), lambda m, x: m.energy_match(x, r, margin=0.45),
            keys + plan, pairs + 2 * batch * r * r * d, 4 if many else 3,
        ),
        Case(
            "merge_rows", what, batch, merge, lambda m, *args: m.merge_rows(*args, prefix=1),
            2 * batch * c * (2 * n + 2 - r) + 8 * batch * (n + r) + 4 * batch * (2 * n - r), 0, 1,
        ),
        Case(
            "received_attention", what, batch, heads_of, lambda m, q, k: m.received_attention(q, k, scale=0.125),
            4 * batch * heads * n * d + 4 * batch * n, 4 * batch * heads * n * n * d, 3, rivals=(COLREDUCE,),
        ),
    ]  # fmt: skip


def _received(n: int, heads: int, d: int, batch: int) -> Case:
    """Column means of one attention of a language model's width: sizes that flash-colreduce is reported at."""

    def pair(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, k = (torch.randn(batch, heads, n, d, device=device, dtype=dtype) for _ in range(2))
        return q, k

    return Case(
        "received_attention", f"N={n}, {heads} heads of {d}", batch, pair,
        lambda m, q, k: m.received_attention(q, k, scale=d**-0.5),
        4 * batch * heads * n * d + 4 * batch * n, 4 * batch * heads * n * n * d, 3, rivals=(COLREDUCE,),
    )  # fmt: skip


def _cached(n: int, heads: int, groups: int, d: int, batch: int) -> Case:
    """What methods of a cache read of one layer: sums over all rows of the prompt and over its last 64, in one pass."""

    def pair(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (torch.randn(batch, count, n, d, device=device, dtype=dtype) for count in (heads, groups))
        return q, k, torch.ones(batch, min(n, 64), dtype=torch.bool, device=device)

    # Two passes over the half of the pairs that causality leaves. Beside the kernels' launches: places of the queries,
    # and the table of the sets (ones, a pad, a stack).
    return Case(
        "causal_column_sums", f"N={n}, {heads} heads of {d} on {groups}", batch, pair,
        lambda m, q, k, last: m.causal_column_sums(q, k, scale=d**-0.5, sets=[None, last]),
        2 * batch * (heads + groups) * n * d + 8 * batch * groups * n, 2 * batch * heads * n * n * d,
        6 + (groups < heads),
    )  # fmt: skip


def _prefill(n: int, k: int, width: int, batch: int = 1) -> list[Case]:
    """What a language model's boundary asks for: k diverse ones of n visual tokens."""

    def features(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return *_keys(batch, n, width)(device, dtype), torch.zeros(batch, dtype=torch.int64, device=device)

    size = 2 * batch * n * width
    return [
        Case(
            "greedy_select", f"N={n}, k={k}, C={width}", batch, features,
            lambda m, x, start: m.greedy_select(x, k, start, rule="sum"), size + 4 * batch * n * (n + k),
            2 * batch * n * n * width, 3, (k, 4 * n), unrolls=True,
        ),
        _determinant(n, k, width, batch),
    ]  # fmt: skip


def _determinant(n: int, k: int, width: int, batch: int) -> Case:
    """The same by determinants: a round reads the factors of all before it, half of them on average."""

    def features(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return *_keys(batch, n, width)(device, dtype), torch.rand(batch, n, device=device, dtype=torch.float32)

    size, factors = 2 * batch * n * width, 2 * batch * n * k * k
    table, program = has_table(n), n <= LIMIT_DETERMINANT
    groups = -(-batch // pictures_at_a_time(batch, n))
    return Case(
        "greedy_determinant", f"N={n}, k={k}, C={width}", batch, features,
        lambda m, x, relevance: m.greedy_determinant(x, k, relevance=relevance),
        (1 if table else k) * size + factors, 2 * batch * n * width * (n if table else k),
        1 + groups * (table + (1 if program else k + 1)), (k, 2 * n * k) if program else (k, 0), unrolls=True,
    )  # fmt: skip


def _removal(n: int, k: int, width: int, batch: int = 1) -> Case:
    """VisPruner's removal: k of n are left, 8 fewer a round."""

    def lists(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        order = torch.rand(batch, n, device=device, dtype=torch.float32).argsort(dim=1)
        return *_keys(batch, n, width)(device, dtype), order

    rounds, left, flops = 0, n, 0
    while left > k:
        rounds, flops = rounds + 1, flops + 2 * batch * ((left + 1) // 2) * (left // 2) * width
        left = remaining(left, k, 8)
    return Case(
        "drop_duplicates", f"N={n}, k={k}, C={width}", batch, lists,
        lambda m, x, order: m.drop_duplicates(x, k=k, order=order), 2 * batch * n * width + 8 * batch * (n + k),
        flops, 6 + 2 * rounds, (rounds, 0), unrolls=True,
    )  # fmt: skip


def _farthest(n: int, k: int, width: int, batch: int) -> Case:
    """k-center by Euclidean distance in fp32, which farthest point sampling is."""
    case = _prefill(n, k, width, batch)[0]
    return replace(
        case, what=f"{case.what}, Euclidean, fp32", dtype=torch.float32, bytes=2 * case.bytes - 4 * batch * n * (n + k),
        run=lambda m, x, start: m.greedy_select(x, k, start, metric="l2"), launches=2, rivals=(_fps(k),),
    )  # fmt: skip


def _transition(n: int, width: int, batch: int = 1) -> Case:
    def pair(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, n, width, device=device, dtype=dtype)
        return x, x + 0.1

    return Case(
        "transition_stats", f"N={n}, C={width}", batch, pair, lambda m, x, y: m.transition_stats(x, y),
        4 * batch * n * width + 8 * batch * n, 0, 1,
    )  # fmt: skip


def cases(small: bool = False) -> list[Case]:
    """The sizes that are reported.

    Args:
        small: sizes for a processor, to see that the benchmark works.

    Returns:
        The cases, op by op: those written here, and those drawn of other ops with a kernel (see `drawn_cases`).
    """
    written = _written(small)
    return sorted([*written, *drawn_cases({case.op for case in written}, small)], key=lambda case: case.op)


def without_case() -> dict[str, str]:
    """Public ops with a kernel that the benchmark leaves out, and why."""
    return lacking({case.op for case in _written(small=True)})


def _written(small: bool) -> list[Case]:
    """Cases written in this module."""
    if small:
        found = _small()
    else:
        found = [case for batch in (1, 32, 256) for case in _tower(batch)]
        found += [*_prefill(576, 57, 4096), *_prefill(576, 57, 4096, 8), *_prefill(2880, 288, 4096)]
        found += [_removal(544, 32, 1024), _removal(544, 32, 1024, 8), _removal(2736, 144, 1024)]
        found += [*_prefill(16384, 1638, 3584), _transition(640, 4096), _transition(640, 4096, 8)]
        found += [_transition(2944, 4096), _transition(16384, 3584)]
        found += [_received(1024, 32, 128, 16), _received(4096, 32, 128, 1), _received(16384, 32, 128, 1)]
        found += [_cached(640, 32, 32, 128, 1), _cached(640, 32, 32, 128, 8), _cached(2944, 32, 8, 128, 1)]
        found += [_cached(16384, 28, 4, 128, 1)]
        found += [_farthest(576, 57, 1024, 1), _farthest(576, 57, 1024, 8), _farthest(2880, 288, 1024, 1)]
    return found


def _small() -> list[Case]:
    found = [*_tower(2, 8), *_prefill(64, 8, 32), _removal(40, 12, 32), _transition(16, 64)]
    return [*found, _received(32, 2, 16, 2), _cached(32, 4, 2, 16, 2), _farthest(64, 8, 32, 2)]
