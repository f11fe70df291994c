"""Views of caches by hand, and the loops that methods of the cache are compared with."""

from __future__ import annotations

import torch

from vlmtok import Site, TokenView
from vlmtok.core.cache_signals import CACHE_SIGNALS
from vlmtok.core.site import Layout, StageLayout


def layout(depth=4, blind=None, heads=2, width=16):
    """A language model whose caches can lose entries, but for those of some layers."""
    caches = StageLayout(depth, width, heads, depth - 1, provides=CACHE_SIGNALS, blind=blind or {})
    return Layout("caches by hand", {"cache": caches})


def view_of(signals, layer=0, depth=4, row=None, entered=None):
    """A view of one layer's entries whose signals are given; tokens have no data, and are as many."""
    first = next(iter(signals.values()))
    n = first.shape[-2] if "cached" in next(iter(signals)) else first.shape[-1]
    tokens = torch.empty(first.shape[0], n, 8, device=first.device)
    return TokenView(tokens, Site("cache", layer), depth=depth, signals=signals, row=row, entered=entered)


def kept(reduction, n):
    """Entries that stay, row by row; all n where nothing was done."""
    if reduction is None:
        return None
    real = torch.ones_like(reduction.keep, dtype=torch.bool) if reduction.valid is None else reduction.valid
    found = [sorted(row[stays].tolist()) for row, stays in zip(reduction.keep, real, strict=True)]
    assert all(len(set(one)) == len(one) and all(0 <= i < n for i in one) for one in found)
    return found


def best(score, k):
    """The k places of highest score, by a loop: the lowest index wins, NaN loses."""
    order = sorted(range(len(score)), key=lambda i: (score[i] != score[i], -score[i] if score[i] == score[i] else 0, i))
    return sorted(order[:k])
