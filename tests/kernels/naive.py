"""The ops once more, in double precision and explicit loops, from their formulas: what `reference` is compared with."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two rows; 0 for a zero row, NaN where a length is not finite."""
    a, b = a.double(), b.double()
    if not (a.norm().isfinite() and b.norm().isfinite()):
        return torch.tensor(float("nan"), dtype=torch.float64)
    return a @ b / (a.norm().clamp_min(1e-12) * b.norm().clamp_min(1e-12))


def match_max(a, b, rank_a=None, rank_b=None, exclude_diag=False, valid_b=None):
    batch, m, _ = a.shape
    value = torch.full((batch, m), float("-inf"), dtype=torch.float64)
    index = torch.zeros(batch, m, dtype=torch.int64)
    for p in range(batch):
        for i in range(m):
            for j in range(b.shape[1]):
                allowed = not (exclude_diag and i == j)
                allowed &= valid_b is None or bool(valid_b[p, j])
                allowed &= rank_a is None or int(rank_b[p, j]) > int(rank_a[p, i])
                similarity = cosine(a[p, i], b[p, j])
                if allowed and similarity > value[p, i]:
                    value[p, i], index[p, i] = similarity, j
    return value, index


def energy(x, margin, alpha=1.0, kind="elu"):
    batch, n, _ = x.shape
    out = torch.zeros(batch, n, dtype=torch.float64)
    for p in range(batch):
        for i in range(n):
            for j in range(n):
                s = float(cosine(x[p, i], x[p, j]).nan_to_num(0.0))
                if kind == "gaussian":
                    sigma = 1 - margin
                    out[p, i] += math.exp(-(((1 - s) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
                elif s - margin >= 0:
                    out[p, i] += s if kind == "paper" else s - margin
                else:
                    out[p, i] += alpha * (math.exp(s - margin) - 1)
    return out / max(n, 1)


def greedy_select(x, k, start, rule="max", metric="cosine", valid=None):
    batch, n, _ = x.shape
    picks = []
    for p in range(batch):
        rows = x[p].double()
        finite = [bool(row.norm().isfinite()) for row in rows]

        def similarity(i, j, rows=rows, finite=finite):
            if not (finite[i] and finite[j]):
                return 0.0
            return float(cosine(rows[i], rows[j])) if metric == "cosine" else -float(((rows[i] - rows[j]) ** 2).sum())

        chosen = [int(start[p])]
        while len(chosen) < k:
            best = None
            for j in range(n):
                if j in chosen:
                    continue
                tier = 2 if valid is not None and not valid[p, j] else 0 if finite[j] else 1
                all_of_them = [similarity(i, j) for i in chosen]
                state = 0.0 if tier else max(all_of_them) if rule == "max" else sum(all_of_them)
                if best is None or (tier, state) < best[:2]:
                    best = (tier, state, j)
            chosen.append(best[2])
        picks.append(chosen[:k])
    return torch.tensor(picks)


def greedy_determinant(x, k, relevance=None, valid=None):
    """What is left of a row is what is left of its length one after projecting the chosen ones away."""
    batch, n, _ = x.shape
    picks, gains = [], []
    for p in range(batch):
        rows = x[p].double()
        finite = [bool(row.norm().isfinite()) for row in rows]
        weight = [1.0 if relevance is None else max(float(relevance[p, j].nan_to_num(0.0)), 0.0) for j in range(n)]
        rest = [rows[j] / rows[j].norm() if finite[j] and rows[j].norm() > 1e-12 else 0 * rows[0] for j in range(n)]
        rest = [row.nan_to_num(0.0) for row in rest]
        chosen, gain = [], []
        while len(chosen) < k:
            best = None
            for j in range(n):
                if j in chosen:
                    continue
                left = round(float(rest[j] @ rest[j]), 10)  # at first 1, so that ties are ties
                tier = 3 if valid is not None and not valid[p, j] else 2 if not finite[j] else 1 if left <= 1e-6 else 0
                value = (weight[j] ** 2 * left, weight[j], 0.0, 0.0)[tier]
                if best is None or (tier, -value) < best[:2]:
                    best = (tier, -value, j)
            tier, value, j = best
            chosen.append(j)
            gain.append(float("nan") if tier else -value)
            if not tier:
                away = rest[j] / rest[j].norm()
                rest = [row - (row @ away) * away for row in rest]
        picks.append(chosen)
        gains.append(gain)
    return torch.tensor(picks, dtype=torch.int64).reshape(batch, k), torch.tensor(gains).reshape(batch, k)


def drop_duplicates(x, order, k, step=8, valid=None):
    """List by list; None in place of a list where a choice hangs on rounding."""
    found = []
    for p, places in enumerate(order.tolist()):
        rows = [row.double() for row in x[p]]
        rows = [row / row.norm() if row.norm().isfinite() and row.norm() > 0 else torch.zeros_like(row) for row in rows]
        if valid is not None:
            there = [j for j in places if valid[p, j]]
            places = there + [j for j in places if not valid[p, j]][: max(0, k - len(there))]
        while places is not None and len(places) > k:
            first, second = places[0::2], places[1::2]
            nearest = {i: max(float(rows[i] @ rows[j]) for j in second) for i in first}
            values = sorted(nearest.values())
            if any(0 < after - before < 1e-6 for before, after in pairwise(values)):
                places = None
                continue
            leave = min(step, len(places) - k, len(first))
            places = sorted(first, key=lambda i, nearest=nearest: -nearest[i])[leave:] + second
        found.append(places)
    return found


def merge_rows(x, size, keep, src, dst, keep_weight=None, src_weight=None):
    x, size = x.double(), size.double()
    batch, slots = keep.shape
    rows = torch.zeros(batch, slots, x.shape[2], dtype=torch.float64)
    total = torch.zeros(batch, slots, dtype=torch.float64)
    for p in range(batch):
        owned = {int(token) for token in keep[p]}
        for s in range(slots):
            total[p, s] = size[p, keep[p, s]]
        members = [[(int(keep[p, s]), None if keep_weight is None else float(keep_weight[p, s]))] for s in range(slots)]
        for r in range(src.shape[1]):
            token, slot = int(src[p, r]), int(dst[p, r])
            if slot < 0:
                continue
            members[slot].append((token, None if src_weight is None else float(src_weight[p, r])))
            if keep_weight is None or token not in owned:
                total[p, slot] += size[p, token]
            owned.add(token)
        for s in range(slots):
            if keep_weight is not None:
                rows[p, s] = sum(weight * x[p, token] for token, weight in members[s])
            elif len(members[s]) == 1 or total[p, s] == size[p, keep[p, s]]:
                rows[p, s] = x[p, keep[p, s]]
            else:
                rows[p, s] = sum(size[p, token] * x[p, token] for token, _ in members[s]) / total[p, s]
    return rows, total


def attention(q, k, scale, bias=None):
    batch, heads, rows, _ = q.shape
    shared = heads // k.shape[1]
    out = torch.zeros(batch, heads, rows, k.shape[2], dtype=torch.float64)
    for p in range(batch):
        for h in range(heads):
            logits = q[p, h].double() @ k[p, h // shared].double().T * scale
            if bias is not None:
                logits = logits + bias.expand(out.shape)[p, h].double()
            out[p, h] = logits.softmax(-1)
    return out


def cover_gains(table, order, weight, candidates):
    """What each of the first choices added to the coverage, times its weight, and the most that any would have."""
    targets, table = range(table.shape[1]), table.double().tolist()
    cover, taken, best = [0.0 for _ in targets], [], []
    behind = set(order[candidates:])
    for step, pick in enumerate(order[:candidates]):
        gain = [
            sum(max(0.0, row[i] - cover[i]) for i in targets) * (1.0 if weight is None else float(weight[j]))
            for j, row in enumerate(table)
        ]
        taken.append(gain[pick])
        best.append(max(g for j, g in enumerate(gain) if j not in order[:step] and j not in behind))
        cover = [max(c, v) for c, v in zip(cover, table[pick])]
    return taken, best
