"""Plain torch definitions of the ops: what each means, and the path on CPU.

Selection maths is fp32 with autocast and TF32 off. Ties go to the lowest index; NaN loses. Arguments are checked by the
public functions of `vlmtok.kernels`, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exact import exact

EPS = 1e-12
"""Smallest length by which a row is divided."""

Match = Callable[..., tuple[Tensor, Tensor]]

STEP_BYTES = {"cpu": 8 << 20}
"""Bytes of similarities held at a time, by type of device: what a processor keeps near it."""
STEP_BYTES_ELSEWHERE = 256 << 20
"""The same where a step costs launches."""

UNORDERED = ("cuda",)
"""Types of devices whose `index_add_` adds in the order in which threads come."""

_LAST = 1e30  # above every state of the greedy choice
_FAR = 1.7e38  # squared lengths from here on have a double that overflows
_SMALL = 16  # rows and columns from which on MKL multiplies equal rows alike


# ---------------------------------------------------------------------- rows
def unit_rows(x: Tensor) -> Tensor:
    """Rows of length one, fp32.

    Args:
        x: `[..., D]`, any floating dtype.

    Returns:
        fp32 `[..., D]`. A zero row stays zero; a row whose length is not finite (NaN, infinity, overflow) becomes NaN.
    """
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / length.clamp_min(EPS).nan_to_num(nan=float("nan"), posinf=float("nan"))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Some rows of every batch entry; the fast form of gather with an expanded index.

    Args:
        x: `[B, N, C]`, any dtype; gradients flow.
        index: int64 `[B, K]`.

    Returns:
        `[B, K, C]`.
    """
    batch, n, width = x.shape
    flat = _flat_index(index, n)
    return x.reshape(batch * n, width).index_select(0, flat).reshape(batch, index.shape[1], width)


def _flat_index(index: Tensor, n: int) -> Tensor:
    """Rows `[B, K]` as rows of the flattened `[B n, C]`."""
    batch, step = index.shape[0], max(n, 1)
    if batch == 1:
        return index.reshape(-1)
    return (index + torch.arange(0, batch * step, step, device=index.device).unsqueeze(1)).reshape(-1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b^T` in which equal rows, and equal columns, get equal products, so that ties are ties.

    MKL takes small matrices, and the edges of narrow ones, another way than the rest: the order of a sum depends on
    where it stands. In float64 that is far below what rounding to fp32 leaves.

    Args:
        a: fp32 `[B, M, D]`.
        b: fp32 `[B, N, D]`.

    Returns:
        fp32 `[B, M, N]`.
    """
    turned = b.transpose(1, 2)
    if a.device.type == "cpu" and min(a.shape[1], b.shape[1]) < _SMALL:
        return (a.double() @ turned.double()).float()
    return a @ turned


def _add_rows(out: Tensor, at: Tensor, change: Tensor) -> Tensor:
    """`out.index_add_(0, at, change)` that gives the same bits every run, also where several rows join one."""
    if out.device.type in UNORDERED:
        return out.index_put_((at,), change, accumulate=True)
    return out.index_add_(0, at, change)


def _steps(batch: int, rows: int, columns: int, device: str) -> list[tuple[slice, slice]]:
    """Pictures, and rows of them, to compare at a time, so that no table of all similarities is ever held.

    Args:
        batch: pictures.
        rows: of each.
        columns: what a row is compared with, in fp32.
        device: type of the device.

    Returns:
        Slices of both axes, together everything. One step while torch traces, where sizes may be symbols.
    """
    everything = [(slice(0, batch), slice(0, rows))]
    if torch.compiler.is_compiling():
        return everything
    room = STEP_BYTES.get(device, STEP_BYTES_ELSEWHERE) // (4 * max(columns, 1))
    if batch * rows <= room or rows == 0:
        return everything
    pictures, some = max(1, room // rows), max(1, min(rows, room))
    return [
        (slice(first, min(first + pictures, batch)), slice(at, min(at + some, rows)))
        for first in range(0, batch, pictures)
        for at in range(0, rows, some)
    ]


def _in_one(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """What steps gave, as if there had been one."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts]).view(shape)


# ---------------------------------------------------------------------- matching
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
        for batch, rows in _steps(a.shape[0], a.shape[1], b.shape[1], a.device.type):
            similarity = _products(a[batch, rows], b[batch]).nan_to_num_(nan=none)
            if exclude_diag:
                if a is b and similarity.shape[1] == similarity.shape[2]:
                    # Small products round (i, j) and (j, i) apart, and tokens that are each other's best must tie.
                    similarity = similarity.add(similarity.transpose(1, 2)).mul_(0.5)
                similarity.diagonal(rows.start, 1, 2).fill_(none)
            if rank_a is not None and rank_b is not None:
                similarity.masked_fill_(rank_b[batch].unsqueeze(1) <= rank_a[batch, rows].unsqueeze(2), none)
            if valid_b is not None:
                similarity.masked_fill_(~valid_b[batch].unsqueeze(1), none)
            found.append(similarity.max(-1))
    value, index = zip(*found)
    return _in_one(value, a.shape[:2]), _in_one(index, a.shape[:2])


def _unit_once(metric: Tensor, match: Match | None) -> tuple[Tensor, Match]:
    """The rows to compare and how: here length is taken off once, a `match` that is given does it itself."""
    return (metric, match) if match is not None else (unit_rows(metric), _match_unit)


def energy(x: Tensor, *, margin: float, alpha: float = 1.0, kind: str = "elu") -> Tensor:
    """Definition of `vlmtok.kernels.energy`."""
    with exact(x.device):
        return _energy_unit(unit_rows(x), margin=margin, alpha=alpha, kind=kind)


def _energy_unit(unit: Tensor, *, margin: float, alpha: float, kind: str) -> Tensor:
    """`energy` of rows that have length one."""
    with exact(unit.device):
        unit = unit.nan_to_num(nan=0.0)
        steps = _steps(unit.shape[0], unit.shape[1], unit.shape[1], unit.device.type)
        parts = [_energy_of(_products(unit[batch, rows], unit[batch]), margin, alpha, kind) for batch, rows in steps]
        return _in_one(parts, unit.shape[:2])


def _energy_of(over: Tensor, margin: float, alpha: float, kind: str) -> Tensor:
    """Energy of rows from their cosines `[B, M, N]`, which are overwritten."""
    if kind == "gaussian":
        sigma = 1.0 - margin
        over.sub_(1.0).div_(sigma).square_().mul_(-0.5).exp_()
        return over.mean(-1) / (sigma * (2.0 * torch.pi) ** 0.5)
    over.sub_(margin)
    alike = (over >= 0).sum(-1) if kind == "paper" else None
    total = _elu(over, alpha).sum(-1)
    if alike is not None:
        total = total + margin * alike
    return total / over.shape[2]


def _elu(x: Tensor, alpha: float) -> Tensor:
    """ELU, in which equal elements get equal values; torch's on a CPU rounds the last ones of a table differently."""
    if x.device.type != "cpu":
        return F.elu(x, alpha, inplace=True)
    below = x.clamp(max=0.0).expm1_()
    return x.clamp_(min=0.0).add_(below, alpha=alpha)


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
    energy_of: Callable[..., Tensor] = _energy_unit,
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


# ---------------------------------------------------------------------- merging
def merge_rows(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    keep_weight: Tensor | None = None,
    src_weight: Tensor | None = None,
    importance: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.merge_rows`."""
    if importance is not None:
        inner = size[:, prefix : size.shape[1] - suffix]
        keep_weight, src_weight = pair_weights(keep, src, dst, importance, inner)
    kept = _widen(keep, prefix, suffix, x.shape[1])
    kept_size = size.gather(1, kept)
    rows = take_rows(x, kept)
    if keep.shape[1] == 0 or (src.shape[1] == 0 and keep_weight is None):
        return rows, kept_size  # nothing joins; without slots, every entry is empty
    empty = dst < 0
    # An empty entry reads and writes slot 0 with weight 0, so that a NaN it names goes nowhere.
    slot = dst.clamp(min=0)
    token = torch.where(empty, keep[:, :1], src) if src.shape[1] else src
    if prefix:
        slot, token = slot + prefix, token + prefix
    at = _flat_index(slot, kept.shape[1])
    joining = take_rows(x, token).flatten(0, 1)
    if keep_weight is None or src_weight is None:
        mass = torch.where(empty, 0.0, size.gather(1, token))
        total = kept_size.scatter_add(1, slot, mass)
        share = mass / total.gather(1, slot).clamp_min(torch.finfo(torch.float32).tiny)
        # x_k + sum share (x_s - x_k): touches only what is joined, and equal rows merge to exactly themselves.
        out = _accumulator(rows).flatten(0, 1)
        change = (joining - out.index_select(0, at)) * share.reshape(-1, 1)
        change.masked_fill_(empty.reshape(-1, 1), 0.0)
    else:
        owned = _owned(src, dst, keep, x.shape[1])
        total = kept_size.scatter_add(1, slot, torch.where(owned, size.gather(1, token), 0.0))
        kept_weight = F.pad(keep_weight, (prefix, suffix), value=1.0) if prefix or suffix else keep_weight
        weight = torch.where(empty, 0.0, src_weight)
        out = (_accumulator(rows) * kept_weight.unsqueeze(-1)).flatten(0, 1)
        change = (_accumulator(joining) * weight.reshape(-1, 1)).masked_fill_(empty.reshape(-1, 1), 0.0)
    return _add_rows(out, at, change.to(out.dtype)).to(x.dtype).reshape(rows.shape), total


def merge_rows_biased(x: Tensor, size: Tensor, *plan: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of `vlmtok.kernels.merge_rows_biased`."""
    rows, total = merge_rows(x, size, *plan, **settings)
    return rows, total, log_size(total, x.dtype)


def pair_weights(keep: Tensor, src: Tensor, dst: Tensor, importance: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a merge in which the more important of two weighs more (CrossGET, arXiv 2305.17455, section 3.2).

    A source s and its slot's own token d share ``w_s + w_d = 2``, the softmax of their importance times 2. Slot d
    becomes ``(s_d x_d + sum [w_s s_s x_s + (w_d - 1) s_d x_d]) / (s_d + sum s_s)`` with sizes s. Equal importance gives
    the size-weighted mean; several sources of one slot, or unequal sizes, give weights that do not sum to one, as
    released.

    Args:
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`, every token at most once.
        dst: int64 `[B, R]`, the slot that each joins, -1 for an empty entry.
        importance: fp32 `[B, N]`; gradients flow.
        size: fp32 `[B, N]`.

    Returns:
        Weights of the kept rows `[B, K]` and of the joining ones `[B, R]`, fp32, as `merge_rows` takes them.
    """
    empty, slot, src = dst < 0, dst.clamp(min=0), src.clamp(min=0)
    pair = torch.stack([importance.gather(1, src), importance.gather(1, keep).gather(1, slot)], -1)
    weight = 2.0 * _accumulator(pair).softmax(-1)
    kept, joined = size.gather(1, keep), size.gather(1, src).masked_fill(empty, 0.0)
    total = kept.scatter_add(1, slot, joined)
    divisor = total.clamp_min(torch.finfo(torch.float32).tiny)
    own = torch.ones_like(kept, dtype=weight.dtype).flatten()
    more = torch.where(empty, 0.0, weight[..., 1] - 1.0).flatten()
    own = _add_rows(own, _flat_index(slot, keep.shape[1]), more).view(keep.shape)
    share = torch.where(empty, 0.0, weight[..., 0] * joined / divisor.gather(1, slot))
    return torch.where(kept == total, own, kept * own / divisor), share


def merge_rows_grad(
    grad: Tensor, keep: Tensor, src: Tensor, dst: Tensor, keep_weight: Tensor, src_weight: Tensor, n: int,
    prefix: int = 0, suffix: int = 0,
) -> Tensor:  # fmt: skip
    """Gradient of `merge_rows` with respect to x: the transposed map.

    Args:
        grad: `[B, prefix + K + suffix, C]`, of the rows.
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`, -1 for an empty entry.
        keep_weight: fp32 `[B, K]`.
        src_weight: fp32 `[B, R]`.
        n: rows of x.
        prefix: as in `merge_rows`.
        suffix: as in `merge_rows`.

    Returns:
        `[B, n, C]` in the dtype of `grad`.
    """
    batch, width = grad.shape[0], grad.shape[2]
    kept = _widen(keep, prefix, suffix, n)
    kept_weight = F.pad(keep_weight, (prefix, suffix), value=1.0) if prefix or suffix else keep_weight
    empty = dst < 0
    weight = torch.where(empty, 0.0, src_weight)
    wide = _accumulator(grad)
    out = wide.new_zeros(batch * n, width)
    _add_rows(out, _flat_index(kept, n), (wide * kept_weight.unsqueeze(-1)).flatten(0, 1).to(out.dtype))
    joined = take_rows(wide, dst.clamp(min=0) + prefix) * weight.unsqueeze(-1)
    joined = torch.where(empty.unsqueeze(-1), 0.0, joined)
    _add_rows(out, _flat_index(src.clamp(min=0) + prefix, n), joined.flatten(0, 1).to(out.dtype))
    return out.reshape(batch, n, width).to(grad.dtype)


def _accumulator(x: Tensor) -> Tensor:
    """At least fp32, the dtype in which sums are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _widen(keep: Tensor, prefix: int, suffix: int, n: int) -> Tensor:
    """`keep` on the whole row, with the rows around it that stay."""
    if not prefix and not suffix:
        return keep
    batch = keep.shape[0]
    head = torch.arange(prefix, device=keep.device).expand(batch, prefix)
    tail = torch.arange(n - suffix, n, device=keep.device).expand(batch, suffix)
    return torch.cat([head, keep + prefix, tail], 1)


def _owned(src: Tensor, dst: Tensor, keep: Tensor, n: int) -> Tensor:
    """Which entries own their token: not empty, the first to name it, and the token is not kept. bool `[B, R]`."""
    batch, entries = src.shape
    token = torch.where(dst < 0, n, src)
    entry = torch.arange(entries, device=src.device).expand_as(src)
    first = src.new_full((batch, n + 1), entries).scatter_reduce(1, token, entry, "amin")
    first = first.scatter(1, keep, src.new_full(keep.shape, entries))
    return (first.gather(1, token) == entry) & (dst >= 0)


# ---------------------------------------------------------------------- greedy choice
def greedy_select(
    x: Tensor,
    k: int,
    start: Tensor,
    *,
    rule: str = "max",
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.greedy_select`."""
    batch, n, _ = x.shape
    if k == 0:
        return start.new_empty(batch, 0), x.new_empty(batch, 0, dtype=torch.float32)
    with exact(x.device):
        if metric == "cosine":
            unit = unit_rows(x)
            gram = _products(unit, unit)
            late = gram.diagonal(dim1=1, dim2=2).isnan()
            gram.masked_fill_(gram.isnan(), 0.0)
        else:
            wide = x.float()
            square = (wide * wide).sum(-1)
            gram = _products(wide, wide).mul_(2.0).sub_(square.unsqueeze(2)).sub_(square.unsqueeze(1))
            late = ~(square < _FAR)
            gram.masked_fill_(~gram.isfinite(), 0.0)
        # A row that is to be taken late has a state that no similarity reaches and that none changes: 1e30 where it is
        # not finite, 2e30 where it is not valid, infinity once it is chosen.
        rows = gram.reshape(batch * n, n)
        offset = torch.arange(0, batch * n, n, device=x.device)
        state = rows.index_select(0, start + offset).masked_fill_(late, _LAST)
        if valid is not None:
            state.masked_fill_(~valid, 2.0 * _LAST)
        state.scatter_(1, start.unsqueeze(1), float("inf"))
        order, value = [start], [state.new_full((batch,), float("nan"))]
        for _ in range(k - 1):
            least, pick = state.min(1)
            order.append(pick)
            value.append(least)
            row = rows.index_select(0, pick + offset)
            state = state.add_(row) if rule == "sum" else torch.maximum(state, row, out=state)
            state.scatter_(1, pick.unsqueeze(1), float("inf"))
        taken = torch.stack(value, 1)
        return torch.stack(order, 1), taken.masked_fill_(taken >= _LAST, float("nan"))


# ---------------------------------------------------------------------- statistics and attention
def transition_stats(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.transition_stats`."""
    with exact(x.device):
        a, b = x.float(), y.float()
        na, nb = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
        ratio = torch.where(na > 0, nb / na.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        cosine = (a * b).sum(-1) / (na.clamp(min=1e-8) * nb.clamp(min=1e-8))
        return ratio, cosine


def attention_rows(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Definition of `vlmtok.kernels.attention_rows`."""
    batch, heads, rows, width = q.shape
    groups, length = k.shape[1], k.shape[2]
    with exact(q.device):
        # Heads that share keys become rows of one product: the keys are not repeated.
        grouped = (q.float() * scale).reshape(batch, groups, heads // max(groups, 1) * rows, width)
        logits = (grouped @ k.float().transpose(-1, -2)).reshape(batch, heads, rows, length)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if bias is not None:
            logits = logits + bias.float()
        return logits.softmax(-1)


def received_attention(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, chunk: int = 256) -> Tensor:
    """Definition of `vlmtok.kernels.received_attention`."""
    with exact(q.device):
        total = q.new_zeros(q.shape[0], k.shape[2], dtype=torch.float32)
        rows = q.shape[2]
        if not torch.compiler.is_compiling():
            chunk = max(1, min(chunk, STEP_BYTES_ELSEWHERE // max(4 * q.shape[0] * q.shape[1] * k.shape[2], 1)))
        for at in range(0, rows, chunk):
            part = bias
            if bias is not None and bias.dim() > 1 and bias.shape[-2] > 1:
                part = bias[..., at : at + chunk, :]
            total = total + attention_rows(q[:, :, at : at + chunk], k, scale=scale, bias=part).sum((1, 2))
        return total / max(q.shape[1] * rows, 1)


def log_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """log(size), taken in fp32 and rounded once to `dtype`."""
    with torch.no_grad():
        return torch.log(size, out=size.new_empty(size.shape, dtype=dtype))


def key_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What proportional attention adds to the logits: log(size) per key (ToMe, arXiv 2210.09461, eq. 1).

    Args:
        size: fp32 `[B, N]`.
        dtype: of the queries; the logarithm is taken in fp32 and rounded once.

    Returns:
        `[B, 1, 1, N]`, to be given to `scaled_dot_product_attention` as ``attn_mask``: broadcast, never `N x N`.
    """
    return log_size(size, dtype)[:, None, None, :]
