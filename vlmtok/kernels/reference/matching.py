"""Who is most similar to whom, and which tokens merge into which."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..exact import exact
from .energies import energy_unit
from .rows import mutual, products, take_rows, unit_rows
from .steps import in_one, in_steps

Match = Callable[..., tuple[Tensor, Tensor]]


def match_max(
    a: Tensor,
    b: Tensor,
    *,
    rank_a: Tensor | None = None,
    rank_b: Tensor | None = None,
    exclude_diag: bool = False,
    valid_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.match_max`."""
    with exact(a.device):
        unit = unit_rows(a)
        other = unit if b is a else unit_rows(b)
        return _match_unit(unit, other, rank_a=rank_a, rank_b=rank_b, exclude_diag=exclude_diag, valid_b=valid_b)


def _match_unit(
    a: Tensor,
    b: Tensor,
    *,
    rank_a: Tensor | None = None,
    rank_b: Tensor | None = None,
    exclude_diag: bool = False,
    valid_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`match_max` of rows that have length one."""
    none = float("-inf")
    if b.shape[1] == 0:
        return a.new_full(a.shape[:2], none), a.new_zeros(a.shape[:2], dtype=torch.int64)
    found = []
    with exact(a.device):
        for batch, rows in in_steps(a.shape[0], a.shape[1], b.shape[1], a.device.type):
            similarity = products(a[batch, rows], b[batch]).nan_to_num_(nan=none)
            if exclude_diag:
                if a is b:
                    similarity = mutual(similarity)
                similarity.diagonal(rows.start, 1, 2).fill_(none)
            if rank_a is not None and rank_b is not None:
                similarity.masked_fill_(rank_b[batch].unsqueeze(1) <= rank_a[batch, rows].unsqueeze(2), none)
            if valid_b is not None:
                similarity.masked_fill_(~valid_b[batch].unsqueeze(1), none)
            found.append(similarity.max(-1))
    value, index = zip(*found)
    return in_one(value, a.shape[:2]), in_one(index, a.shape[:2])


def _unit_once(metric: Tensor, match: Match | None) -> tuple[Tensor, Match]:
    """The rows to compare and how: here length is taken off once, a `match` that is given does it itself."""
    return (metric, match) if match is not None else (unit_rows(metric), _match_unit)


def bipartite_match(
    metric: Tensor, r: int, num_prefix: int = 0, *, match: Match | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of `vlmtok.kernels.bipartite_match`. The Triton path passes its own `match`."""
    metric, match = _unit_once(metric, match)
    batch, n, _ = metric.shape
    first = num_prefix % 2  # of these tokens, the first at an even place of the whole row
    place = torch.arange(n, device=metric.device)
    even, odd = place[first::2], place[1 - first :: 2]
    similarity, partner = match(metric[:, first::2], metric[:, 1 - first :: 2])
    order = similarity.argsort(dim=1, descending=True, stable=True)
    merged, stay = order[:, :r], order[:, r:]
    if num_prefix:
        stay = stay.sort(dim=1).values
    keep = torch.cat([even[stay], odd.expand(batch, -1)], 1)
    return keep, even[merged], partner.gather(1, merged) + stay.shape[1]


def energy_match(
    metric: Tensor,
    r: int,
    *,
    margin: float,
    alpha: float = 1.0,
    kind: str = "elu",
    split: str = "alternate",
    protect: bool = True,
    energy_of: Callable[..., Tensor] = energy_unit,
    match: Match | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of `vlmtok.kernels.energy_match`. The Triton path passes its own `energy_of` and `match`."""
    metric, match = _unit_once(metric, match)
    order = energy_of(metric, margin=margin, alpha=alpha, kind=kind).argsort(dim=1, descending=True, stable=True)
    if protect:
        top, rest = order[:, : 2 * r], order[:, 2 * r :]
        sources, targets = (top[:, 0::2], top[:, 1::2]) if split == "alternate" else (top[:, :r], top[:, r:])
        _, partner = match(take_rows(metric, sources), take_rows(metric, targets))
    else:
        sources, targets = order[:, 0::2], order[:, 1::2]
        similarity, partner = match(take_rows(metric, sources), take_rows(metric, targets))
        best = similarity.argsort(dim=1, descending=True, stable=True)
        rest = sources.gather(1, best[:, r:])
        sources, partner = sources.gather(1, best[:, :r]), partner.gather(1, best[:, :r])
    return torch.cat([rest, targets], 1), sources, partner + rest.shape[1]


def query_cosine(x: Tensor, query: Tensor) -> Tensor:
    """Cosine of every row with one that asks.

    Args:
        x: `[B, N, D]`, any floating dtype.
        query: `[B, D]`, likewise.

    Returns:
        fp32 `[B, N]`; 0 where a row or its query is not finite.
    """
    with exact(x.device):
        return _query_unit(unit_rows(x), query)


def _query_unit(unit: Tensor, query: Tensor) -> Tensor:
    """`query_cosine` of rows that have length one."""
    return (unit @ unit_rows(query).unsqueeze(-1)).squeeze(-1).nan_to_num(0.0)


def guided_match(metric: Tensor, query: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of `vlmtok.kernels.guided_match`."""
    with exact(metric.device):
        unit = unit_rows(metric)
        importance = _query_unit(unit, query)
        return *complete_match(unit, importance, r, match=_match_unit), importance


def complete_match(
    metric: Tensor,
    importance: Tensor | None,
    r: int,
    protected: Tensor | None = None,
    *,
    match: Match | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of `vlmtok.kernels.complete_match`. The Triton path passes its own `match`."""
    metric, match = _unit_once(metric, match)
    free = None if protected is None else ~protected
    best, _ = match(metric, metric, exclude_diag=True, valid_b=free)
    if protected is not None:
        best = best.masked_fill(protected, float("-inf"))
    order = best.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(metric.shape[1], device=metric.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    later, _ = match(metric, metric, rank_a=rank, rank_b=rank, exclude_diag=True, valid_b=free)
    priority = -later if importance is None else importance.float() - later
    if protected is not None:  # behind every other token, one without a partner or with NaN included
        most, none = torch.finfo(torch.float32).max, float("inf")
        priority = priority.nan_to_num(nan=most, posinf=most, neginf=-none).masked_fill(protected, none)
    order = priority.argsort(dim=1, stable=True)
    src, keep = order[:, :r], order[:, r:].sort(dim=1).values
    valid = None if free is None else free.gather(1, keep)
    _, dst = match(take_rows(metric, src), take_rows(metric, keep), valid_b=valid)
    return keep, src, dst
