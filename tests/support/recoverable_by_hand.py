"""Recoverable Compression in plain loops and float64, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def lof(values: list[float], k: int) -> list[float]:
    """Local outlier factors of single numbers."""
    n, k = len(values), min(k, len(values) - 1)
    if k < 1:
        return [1.0] * n
    gaps = [[abs(a - b) for b in values] for a in values]
    near = [sorted((j for j in range(n) if j != i), key=lambda j: (gaps[i][j], j))[:k] for i in range(n)]
    far = [gaps[i][near[i][-1]] for i in range(n)]
    density = [1 / (sum(max(gaps[i][j], far[j]) for j in near[i]) / k + 1e-10) for i in range(n)]
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(n)]


@dataclass
class Recovered:
    """What stays of a row.

    Attributes:
        kept: places of tokens that stay as they are, ascending.
        centres: places of those that gather, by falling attention.
        loose: places of the others, ascending.
        slots: places of the tokens that represent slots, and the slots' values, in the order of the features' form.
        margin: how far the nearest choice is from falling otherwise.
    """

    kept: list[int]
    centres: list[int]
    loose: list[int]
    slots: dict[int, Tensor]
    margin: float


def recovered(
    x: Tensor,
    attention: Tensor,
    keys: Tensor,
    relevance: Tensor,
    neighbours: int = 32,
    weight: float = 50.0,
    ks: tuple[int, int, int] = (20, 20, 10),
) -> Recovered:
    """The description's steps.

    Args:
        x: `[N, C]`.
        attention: `[N]`.
        keys: `[N, D]`.
        relevance: `[N]`.
        neighbours: that join a centre.
        weight: of the relevance.
        ks: neighbours of the outlier factors.
    """
    a, s, x = attention.double().tolist(), relevance.double().tolist(), x.double()
    n, unit, margin = len(a), F.normalize(keys.double(), dim=-1), float("inf")

    def outlying(values: list[float], k: int) -> float:
        nonlocal margin
        factors = lof(values, k)
        margin = min([margin, *(abs(f - 1.5) for f in factors)])
        return sum(f > 1.5 for f in factors) / len(values)

    def best(score: list[float], among: list[int], count: int) -> list[int]:
        return sorted(among, key=lambda i: -score[i])[:count]

    by_visual = best(a, list(range(n)), int(n * outlying(a, ks[0])))
    s = [min(s) if i in by_visual else one for i, one in enumerate(s)]
    others = [i for i in range(n) if i not in by_visual]
    by_text = best(s, others, int(len(others) * outlying(s, ks[1])))
    kept = sorted(by_visual + by_text)
    rest = [i for i in range(n) if i not in kept]
    centres = best(a, rest, int(len(rest) * outlying([a[i] for i in rest], ks[2]))) if rest else []
    slots = {i: x[i] for i in kept}
    for c in centres:
        score = {j: float(unit[c] @ unit[j]) + weight * s[j] for j in rest if j != c}
        ranked = sorted(score, key=lambda j: -score[j])
        if len(ranked) > neighbours:
            margin = min(margin, score[ranked[neighbours - 1]] - score[ranked[neighbours]])
        slots[c] = x[c] + sum((a[j] * x[j] for j in ranked[:neighbours]), torch.zeros_like(x[c]))
    loose = [i for i in rest if i not in centres]
    if loose and (centres or not kept):
        slots[loose[0]] = sum((a[j] * x[j] for j in loose), torch.zeros_like(x[0]))
    return Recovered(kept, centres, loose, slots, margin)
