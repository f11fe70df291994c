"""Plain torch definitions of the ops: what each means, and the path on CPU.

Selection maths is fp32 with autocast off. Ties go to the lowest index; NaN loses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length one, fp32; a zero row stays zero, a row with NaN or infinity becomes NaN."""
    return F.normalize(x.float(), dim=-1, eps=_EPS)


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
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        sim = unit_rows(a) @ unit_rows(b).transpose(1, 2)
        sim = sim.masked_fill(sim.isnan(), float("-inf"))
        if exclude_diag:
            i = torch.arange(a.shape[1], device=a.device)
            j = torch.arange(b.shape[1], device=a.device)
            sim = sim.masked_fill(i[:, None] == j, float("-inf"))
        if rank_a is not None and rank_b is not None:
            sim = sim.masked_fill(rank_b[:, None, :] <= rank_a[:, :, None], float("-inf"))
        if valid_b is not None:
            sim = sim.masked_fill(~valid_b[:, None, :], float("-inf"))
        value, index = sim.max(-1)
        return value, index


def energy(x: Tensor, *, margin: float, alpha: float = 1.0, kind: str = "elu") -> Tensor:
    """PiToMe's energy: how much company a token has (arXiv 2405.16148, eq. 4).

    Args:
        x: `[B, N, D]`, the metric, any floating dtype.
        margin: cosine from which on two tokens count as alike.
        alpha: slope of the part below the margin.
        kind: ``"elu"`` mean of ELU(cos - margin), as released; ``"paper"`` counts the full cosine above the margin,
            as printed; ``"gaussian"`` mean of a Gaussian kernel of width 1 - margin, as released for text.

    Returns:
        fp32 `[B, N]`; higher means more redundant. The diagonal is counted. A row with NaN counts as a zero row.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        unit = unit_rows(x).nan_to_num(0.0)
        sim = unit @ unit.transpose(1, 2)
        if kind == "gaussian":
            sigma = 1.0 - margin
            kernel = torch.exp(-0.5 * ((1.0 - sim) / sigma) ** 2) / (sigma * (2.0 * torch.pi) ** 0.5)
            return kernel.mean(-1)
        over = sim - margin
        below = alpha * (torch.exp(over.clamp(max=0.0)) - 1.0)
        if kind == "elu":
            return torch.where(over > 0, over, below).mean(-1)
        if kind == "paper":
            return torch.where(over >= 0, sim, below).mean(-1)
        raise ValueError(f"energy kind must be 'elu', 'paper' or 'gaussian', got {kind!r}")


def merge_rows(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    keep_weight: Tensor | None = None,
    src_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gathers the kept rows and adds the joining rows to them (see `vlmtok.Reduction` for the meaning).

    Args:
        x: `[B, N, C]`, any floating dtype; gradients flow.
        size: fp32 `[B, N]`.
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`, -1 for an empty entry.
        keep_weight: fp32 `[B, K]`, or None for the size-weighted mean; gradients flow.
        src_weight: fp32 `[B, R]`, or None; gradients flow.

    Returns:
        The slots `[B, K, C]` in the dtype of `x`, and their sizes, fp32 `[B, K]`.
    """
    batch, slots = keep.shape
    entries = src.shape[1]
    rows = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    kept_size = size.gather(1, keep)
    if entries == 0:
        if keep_weight is not None:
            rows = (rows.float() * keep_weight.unsqueeze(-1)).to(x.dtype)
        return rows, kept_size
    empty = dst < 0
    slot = dst.clamp(min=0)
    if keep_weight is None or src_weight is None:
        mass = torch.where(empty, 0.0, size.gather(1, src))
        total = kept_size.scatter_add(1, slot, mass)
        alone = total == kept_size  # nothing joined, or only size 0: the row stays bit for bit
        keep_weight = torch.where(alone, 1.0, kept_size / total)
        src_weight = mass / total.gather(1, slot)
    else:
        owned = _owned(src, dst, keep, x.shape[1])
        total = kept_size.scatter_add(1, slot, torch.where(owned, size.gather(1, src), 0.0))
        src_weight = torch.where(empty, 0.0, src_weight)
    joining = x.gather(1, src.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    out = rows.float() * keep_weight.unsqueeze(-1)
    offset = torch.arange(0, batch * slots, slots, device=x.device).unsqueeze(1)
    out = out.reshape(batch * slots, -1).index_add(
        0, (slot + offset).reshape(-1), (joining.float() * src_weight.unsqueeze(-1)).reshape(batch * entries, -1)
    )
    return out.reshape(batch, slots, -1).to(x.dtype), total


def _owned(src: Tensor, dst: Tensor, keep: Tensor, n: int) -> Tensor:
    """Which entries own their token: not empty, the first to name it, and the token is not kept. bool `[B, R]`."""
    batch, entries = src.shape
    token = torch.where(dst < 0, n, src)
    entry = torch.arange(entries, device=src.device).expand_as(src)
    first = src.new_full((batch, n + 1), entries).scatter_reduce(1, token, entry, "amin")
    first = first.scatter(1, keep, entries)
    return (first.gather(1, token) == entry) & (dst >= 0)


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
        The choice in the order taken, int64 `[B, k]`, and the state at which each was taken, fp32 `[B, k]` (the
        maximum or the sum of similarities; NaN for the first). The lowest index wins a tie; NaN rows come last.
    """
    if rule not in ("max", "sum"):
        raise ValueError(f"rule must be 'max' or 'sum', got {rule!r}")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            unit = unit_rows(x)
            gram = unit @ unit.transpose(1, 2)
        elif metric == "l2":
            wide = x.float()
            square = (wide * wide).sum(-1)
            gram = 2.0 * (wide @ wide.transpose(1, 2)) - square[:, :, None] - square[:, None, :]
        else:
            raise ValueError(f"metric must be 'cosine' or 'l2', got {metric!r}")
        return _greedy(gram, k, start, rule, valid)


def _greedy(gram: Tensor, k: int, start: Tensor, rule: str, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loop of `greedy_select` on similarities `[B, N, N]`."""
    batch, n = gram.shape[:2]
    # Tiers keep the order right without a branch: free rows, then NaN rows, then invalid rows, then chosen rows.
    tier = gram.diagonal(dim1=1, dim2=2).isnan().to(torch.int32)
    if valid is not None:
        tier = torch.where(valid, tier, 2)
    gram = gram.nan_to_num(nan=0.0)
    lanes = torch.arange(batch, device=gram.device)
    order, value = [start], [gram.new_full((batch,), float("nan"))]
    state = gram[lanes, start]
    tier = tier.scatter(1, start.unsqueeze(1), 3)
    big = torch.finfo(torch.float32).max
    for _ in range(k - 1):
        masked = torch.where(tier == 0, state, big)
        fallback = tier.to(torch.float32) * n + torch.arange(n, device=gram.device)
        pick = torch.where((tier == 0).any(1), masked.argmin(1), fallback.argmin(1))
        order.append(pick)
        value.append(state[lanes, pick])
        row = gram[lanes, pick]
        state = state + row if rule == "sum" else torch.maximum(state, row)
        tier = tier.scatter(1, pick.unsqueeze(1), 3)
    return torch.stack(order[:k], 1), torch.stack(value[:k], 1)


def transition_stats(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How a module changes a token: the ratio of norms and the cosine (TransPrune, arXiv 2507.20630, eq. 1 and 2).

    Args:
        x: `[..., L, C]`, input of the module.
        y: `[..., L, C]`, its output.

    Returns:
        ``|y| / |x|`` and ``cos(x, y)``, fp32 `[..., L]`; a zero row has ratio 0 and cosine 0.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        a, b = x.float(), y.float()
        na, nb = a.norm(dim=-1), b.norm(dim=-1)
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
        fp32 `[B, H, T, L]`.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        heads, groups = q.shape[1], k.shape[1]
        wide = k.float()
        if heads != groups:
            wide = wide.repeat_interleave(heads // groups, 1)
        logits = (q.float() * scale) @ wide.transpose(-1, -2)
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
    with torch.no_grad():
        total = q.new_zeros(q.shape[0], k.shape[2], dtype=torch.float32)
        rows = q.shape[2]
        for at in range(0, rows, chunk):
            part = bias
            if bias is not None and bias.shape[-2] > 1:
                part = bias[..., at : at + chunk, :]
            total = total + attention_rows(q[:, :, at : at + chunk], k, scale=scale, bias=part).sum((1, 2))
        return total / (q.shape[1] * rows)
