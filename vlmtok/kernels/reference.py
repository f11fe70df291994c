"""Plain torch definitions of the ops: what each means, and the path on CPU.

Selection maths is fp32 with autocast and TF32 off. Ties go to the lowest index; NaN loses. Arguments are checked by the
public functions of `vlmtok.kernels`, not here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact import exact

EPS = 1e-12
"""Smallest length by which a row is divided."""

_LAST = 1e30  # above every state of the greedy choice


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
    batch = index.shape[0]
    if batch == 1:
        return index.reshape(-1)
    return (index + torch.arange(0, batch * n, n, device=index.device).unsqueeze(1)).reshape(-1)


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
    """The most similar row of `b` for each row of `a`, by cosine.

    Args:
        a: `[B, M, D]`, any floating dtype.
        b: `[B, N, D]`.
        rank_a: int `[B, M]`, and
        rank_b: int `[B, N]`: row i may only match columns j with ``rank_b[j] > rank_a[i]``. Both or neither.
        exclude_diag: row i may not match column i.
        valid_b: bool `[B, N]`, columns that may be matched; None means all.

    Returns:
        The cosine, fp32 `[B, M]` (-inf where no column is allowed), and its column, int64 `[B, M]` (0 there). The
        lowest column wins a tie; a NaN similarity never wins.
    """
    none = float("-inf")
    if b.shape[1] == 0:
        return a.new_full(a.shape[:2], none, dtype=torch.float32), a.new_zeros(a.shape[:2], dtype=torch.int64)
    with exact(a.device):
        similarity = (unit_rows(a) @ unit_rows(b).transpose(1, 2)).nan_to_num_(nan=none)
        if exclude_diag:
            similarity.diagonal(dim1=1, dim2=2).fill_(none)
        if rank_a is not None and rank_b is not None:
            similarity.masked_fill_(rank_b.unsqueeze(1) <= rank_a.unsqueeze(2), none)
        if valid_b is not None:
            similarity.masked_fill_(~valid_b.unsqueeze(1), none)
        value, index = similarity.max(-1)
        return value, index


def energy(x: Tensor, *, margin: float, alpha: float = 1.0, kind: str = "elu") -> Tensor:
    """PiToMe's energy: how much company a token has (arXiv 2405.16148, eq. 4).

    Args:
        x: `[B, N, D]`, the metric, any floating dtype.
        margin: cosine from which on two tokens count as alike.
        alpha: slope of the part below the margin.
        kind: ``"elu"`` mean of ELU(cos - margin), as released; ``"paper"`` counts the full cosine from the margin on,
            as printed; ``"gaussian"`` mean of a Gaussian kernel of width 1 - margin, as released for text.

    Returns:
        fp32 `[B, N]`; higher means more redundant. The diagonal is counted. A row that is not finite counts as a zero
        row.
    """
    with exact(x.device):
        unit = unit_rows(x).nan_to_num_(nan=0.0)
        over = unit @ unit.transpose(1, 2)
        if kind == "gaussian":
            sigma = 1.0 - margin
            over.sub_(1.0).div_(sigma).square_().mul_(-0.5).exp_()
            return over.mean(-1) / (sigma * (2.0 * torch.pi) ** 0.5)
        over.sub_(margin)
        alike = (over >= 0).sum(-1) if kind == "paper" else None
        total = F.elu(over, alpha, inplace=True).sum(-1)
        if alike is not None:
            total = total + margin * alike
        return total / x.shape[1]


def bipartite_match(metric: Tensor, r: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs the even places of a row with the odd ones and merges the r most similar pairs (ToMe, arXiv 2210.09461).

    Args:
        metric: `[B, N, D]`, what is compared; protected tokens are not among them.
        r: pairs to merge, 0 to N // 2.
        num_prefix: protected tokens in front of the row; they count for which places are even.

    Returns:
        keep `[B, N - r]`: the even places that stay (ascending behind a prefix, by falling similarity without one),
        then the odd ones; src `[B, r]` by falling similarity; dst `[B, r]`, the slot of each. All int64.
    """
    batch, n, _ = metric.shape
    first = num_prefix % 2  # of these tokens, the first at an even place of the whole row
    even = torch.arange(first, n, 2, device=metric.device)
    odd = torch.arange(1 - first, n, 2, device=metric.device)
    similarity, partner = match_max(metric[:, first::2], metric[:, 1 - first :: 2])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """PiToMe's matching (arXiv 2405.16148, algorithm 1).

    Args:
        metric: `[B, N, D]`, what is compared; protected tokens are not among them.
        r: tokens to merge away, 0 to N // 2.
        margin: as in `energy`.
        alpha: as in `energy`.
        kind: as in `energy`.
        split: the 2r tokens of highest energy are split into sources and targets by ``"alternate"`` ranks, or into
            ``"halves"``.
        protect: leave tokens of low energy alone; False matches all tokens, every second rank with the others, and
            merges the r most similar pairs (the ordered matching of the released DeiT and MAE patches).

    Returns:
        keep `[B, N - r]`: protected tokens by falling energy (or unmerged sources by falling similarity), then the
        targets by falling energy; src `[B, r]`; dst `[B, r]`, the slot of each. All int64.
    """
    order = energy(metric, margin=margin, alpha=alpha, kind=kind).argsort(dim=1, descending=True, stable=True)
    if protect:
        top, rest = order[:, : 2 * r], order[:, 2 * r :]
        sources, targets = (top[:, 0::2], top[:, 1::2]) if split == "alternate" else (top[:, :r], top[:, r:])
        _, partner = match_max(take_rows(metric, sources), take_rows(metric, targets))
    else:
        sources, targets = order[:, 0::2], order[:, 1::2]
        similarity, partner = match_max(take_rows(metric, sources), take_rows(metric, targets))
        best = similarity.argsort(dim=1, descending=True, stable=True)
        rest = sources.gather(1, best[:, r:])
        sources, partner = sources.gather(1, best[:, :r]), partner.gather(1, best[:, :r])
    return torch.cat([rest, targets], 1), sources, partner + rest.shape[1]


def complete_match(
    metric: Tensor, importance: Tensor, r: int, protected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Complete-graph soft matching of CrossGET (arXiv 2305.17455, section 3.1).

    Every token looks for its most similar token among those whose own best similarity ranks later; the r tokens of
    smallest importance minus that similarity join their most similar token among the others.

    Args:
        metric: `[B, N, D]`, what is compared.
        importance: `[B, N]`; important tokens merge later.
        r: tokens to merge away; at most (N - protected tokens) // 2, or protected ones would merge.
        protected: bool `[B, N]`, tokens that neither join nor are joined; None means none.

    Returns:
        keep `[B, N - r]` ascending; src `[B, r]` by rising priority; dst `[B, r]`, the slot of each. All int64.
    """
    free = None if protected is None else ~protected
    best, _ = match_max(metric, metric, exclude_diag=True, valid_b=free)
    if protected is not None:
        best = best.masked_fill(protected, float("-inf"))
    order = best.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(metric.shape[1], device=metric.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    later, _ = match_max(metric, metric, rank_a=rank, rank_b=rank, valid_b=free)
    if protected is not None:
        later = later.masked_fill(protected, float("-inf"))
    priority = (importance.float() - later).argsort(dim=1, stable=True)
    src, keep = priority[:, :r], priority[:, r:].sort(dim=1).values
    valid = None if free is None else free.gather(1, keep)
    _, dst = match_max(take_rows(metric, src), take_rows(metric, keep), valid_b=valid)
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
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gathers the kept rows and adds the joining rows to them (see `vlmtok.Reduction` for the meaning).

    Args:
        x: `[B, prefix + N + suffix, C]`, any floating dtype; gradients flow.
        size: fp32 `[B, prefix + N + suffix]`.
        keep: int64 `[B, K]`; keep, src and dst count from the first row behind the prefix.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`, -1 for an empty entry.
        keep_weight: fp32 `[B, K]`, or None for the size-weighted mean; gradients flow.
        src_weight: fp32 `[B, R]`, or None; gradients flow.
        prefix: rows in front that stay as they are.
        suffix: rows behind that stay as they are.

    Returns:
        The rows `[B, prefix + K + suffix, C]` in the dtype of `x`, and their sizes, fp32. Sums are accumulated in fp32;
        a slot that nothing joins is its kept row, bit for bit, where there are no weights.
    """
    keep, dst, src = _widen(keep, prefix, suffix, x.shape[1]), torch.where(dst < 0, dst, dst + prefix), src + prefix
    kept_size = size.gather(1, keep)
    rows = take_rows(x, keep)
    entries = src.shape[1]
    if entries == 0 and keep_weight is None:
        return rows, kept_size
    empty = dst < 0
    # An empty entry reads and writes slot 0 with weight 0, so that a NaN it names goes nowhere.
    slot = dst.clamp(min=0)
    token = torch.where(empty, keep[:, :1], src) if entries else src
    at = _flat_index(slot, keep.shape[1])
    joining = take_rows(x, token).flatten(0, 1)
    if keep_weight is None or src_weight is None:
        mass = torch.where(empty, 0.0, size.gather(1, src))
        total = kept_size.scatter_add(1, slot, mass)
        share = mass / total.gather(1, slot).clamp_min(torch.finfo(torch.float32).tiny)
        # x_k + sum share (x_s - x_k): touches only what is joined, and equal rows merge to exactly themselves.
        out = _accumulator(rows).flatten(0, 1)
        change = (joining - out.index_select(0, at)) * share.reshape(-1, 1)
    else:
        owned = _owned(src, dst, keep, x.shape[1])
        total = kept_size.scatter_add(1, slot, torch.where(owned, size.gather(1, src), 0.0))
        kept_weight = F.pad(keep_weight, (prefix, suffix), value=1.0) if prefix or suffix else keep_weight
        weight = torch.where(empty, 0.0, src_weight)
        out = (_accumulator(rows) * kept_weight.unsqueeze(-1)).flatten(0, 1)
        change = _accumulator(joining) * weight.reshape(-1, 1)
    return out.index_add_(0, at, change.to(out.dtype)).to(x.dtype).reshape(rows.shape), total


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
    batch, slots, width = grad.shape
    kept = _widen(keep, prefix, suffix, n)
    kept_weight = F.pad(keep_weight, (prefix, suffix), value=1.0) if prefix or suffix else keep_weight
    empty = dst < 0
    weight = torch.where(empty, 0.0, src_weight)
    wide = _accumulator(grad)
    out = wide.new_zeros(batch * n, width)
    out.index_add_(0, _flat_index(kept, n), (wide * kept_weight.unsqueeze(-1)).flatten(0, 1).to(out.dtype))
    joined = take_rows(wide, dst.clamp(min=0) + prefix) * weight.unsqueeze(-1)
    joined = torch.where(empty.unsqueeze(-1), 0.0, joined)
    out.index_add_(0, _flat_index(src + prefix, n), joined.flatten(0, 1).to(out.dtype))
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
    first = first.scatter(1, keep, entries)
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
    """Farthest-first choice of k rows, one after the other.

    Args:
        x: `[B, N, D]`, any floating dtype.
        k: how many, at most N.
        start: int64 `[B]`, the first row chosen.
        rule: the next row minimises its ``"max"`` similarity to the chosen ones (k-center) or the ``"sum"`` of
            similarities (max-sum diversification).
        metric: ``"cosine"``, or ``"l2"`` for minus the squared Euclidean distance (rule ``"max"`` only).
        valid: bool `[B, N]`, rows that may be chosen; None means all. A row with fewer than k valid ones repeats none:
            it goes on with the invalid ones, lowest index first.

    Returns:
        The choice in the order taken, int64 `[B, k]`, and the state at which each was taken, fp32 `[B, k]`: the
        maximum or the sum of similarities; NaN for the first and for rows taken because no other was left. The lowest
        index wins a tie; rows that are not finite come after the others.
    """
    batch, n, _ = x.shape
    if k == 0:
        return start.new_empty(batch, 0), x.new_empty(batch, 0, dtype=torch.float32)
    with exact(x.device):
        if metric == "cosine":
            unit = unit_rows(x)
            gram = unit @ unit.transpose(1, 2)
        else:
            wide = x.float()
            square = (wide * wide).sum(-1)
            gram = (wide @ wide.transpose(1, 2)).mul_(2.0).sub_(square.unsqueeze(2)).sub_(square.unsqueeze(1))
        # A row that is to be taken late has a state that no similarity reaches and that none changes: 1e30 where it is
        # not finite, 2e30 where it is not valid, infinity once it is chosen.
        late = gram.diagonal(dim1=1, dim2=2).isnan()
        rows = gram.masked_fill_(gram.isnan(), 0.0).reshape(batch * n, n)
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
    """How a module changes a token: the ratio of norms and the cosine (TransPrune, arXiv 2507.20630, eq. 1 and 2).

    Args:
        x: `[..., L, C]`, input of the module.
        y: `[..., L, C]`, its output.

    Returns:
        ``|y| / |x|`` and ``cos(x, y)``, fp32 `[..., L]`; a zero row of x has ratio 0, and either has cosine 0.
    """
    with exact(x.device):
        a, b = x.float(), y.float()
        na, nb = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
        ratio = torch.where(na > 0, nb / na.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        cosine = (a * b).sum(-1) / (na * nb).clamp(min=1e-8)
        return ratio, cosine


def attention_rows(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows, in fp32.

    Args:
        q: `[B, H, T, d]`.
        k: `[B, Hkv, L, d]`; Hkv divides H (grouped-query attention).
        scale: factor of the logits.
        bias: what is added to the logits, broadcastable to `[B, H, T, L]`, or None.

    Returns:
        fp32 `[B, H, T, L]`. A row that may look nowhere (bias -inf everywhere) is NaN, as in torch's softmax.
    """
    batch, heads, rows, width = q.shape
    groups, length = k.shape[1], k.shape[2]
    with exact(q.device):
        # Heads that share keys become rows of one product: the keys are not repeated.
        grouped = (q.float() * scale).reshape(batch, groups, heads // max(groups, 1) * rows, width)
        logits = (grouped @ k.float().transpose(-1, -2)).reshape(batch, heads, rows, length)
        if bias is not None:
            logits = logits + bias.float()
        return logits.softmax(-1)


def received_attention(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, chunk: int = 256) -> Tensor:
    """Attention that each token receives: the mean over heads and query rows, no `[L, L]` kept.

    Args:
        q: `[B, H, L, d]`.
        k: `[B, Hkv, L, d]`.
        scale: factor of the logits.
        bias: broadcastable to `[B, H, L, L]`, or None.
        chunk: query rows per step.

    Returns:
        fp32 `[B, L]`; a row sums to 1.
    """
    with exact(q.device):
        total = q.new_zeros(q.shape[0], k.shape[2], dtype=torch.float32)
        rows = q.shape[2]
        for at in range(0, rows, chunk):
            part = bias
            if bias is not None and bias.dim() > 1 and bias.shape[-2] > 1:
                part = bias[..., at : at + chunk, :]
            total = total + attention_rows(q[:, :, at : at + chunk], k, scale=scale, bias=part).sum((1, 2))
        return total / max(q.shape[1] * rows, 1)


def key_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What proportional attention adds to the logits: log(size) per key (ToMe, arXiv 2210.09461, eq. 1).

    Args:
        size: fp32 `[B, N]`.
        dtype: of the queries; the logarithm is taken in fp32 and rounded once.

    Returns:
        `[B, 1, 1, N]`, to be given to `scaled_dot_product_attention` as ``attn_mask``: broadcast, never `N x N`.
    """
    with torch.no_grad():
        bias = torch.log(size, out=size.new_empty(size.shape, dtype=dtype))
        return bias[:, None, None, :]
