"""Signals of a key-value cache: attention mass that its entries received, and the entries; the table is in `signals`.

A mass is a column sum over rows of queries. It is made in chunks of rows while a layer's queries are at hand, so that
neither queries nor a square of attention outlive the layer: what stays is one number for each entry and key-value head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from .decoder_signals import DecoderTaps

MASSES = frozenset({"attention_mass", "text_mass", "recent_mass"})
"""Signals that are sums over rows of queries, made while the layer runs."""
ENTRIES = frozenset({"keys_cached", "values_cached"})
"""What the cache holds."""
CACHE_SIGNALS = MASSES | ENTRIES | {"attention_rows"}
CHUNK = 128
"""Rows of queries whose attention is held at a time."""


def summed(name: str, taps: DecoderTaps, window: int = 0) -> Tensor:
    """Rows of queries that a mass is a sum over, int64 `[B, R]`; arguments as those of `mass`."""
    if name == "text_mass":
        return taps.text
    batch, length = taps.here.shape
    first = 0 if name == "attention_mass" else max(length - window, 0)
    return torch.arange(first, length, device=taps.here.device).expand(batch, -1)


def mass(name: str, taps: DecoderTaps, kv_heads: int, window: int = 0) -> Tensor:
    """Attention that each token of the row received from some rows.

    Args:
        name: one of `MASSES`.
        taps: of a layer that ran.
        kv_heads: Hkv; heads that share keys are averaged.
        window: of ``recent_mass``: how many of the last rows.

    Returns:
        fp32 `[B, Hkv, L]`, after softmax over all that the layer saw.
    """
    rows, k = summed(name, taps, window), taps.k()
    total = torch.zeros(rows.shape[0], kv_heads, k.shape[2], dtype=torch.float32, device=k.device)
    for part in rows.split(CHUNK, 1) if rows.shape[1] else ():
        total += _attention(taps, part, k).sum(2).unflatten(1, (kv_heads, -1)).mean(2)
    return total.gather(2, taps.here[:, None, :].expand(-1, kv_heads, -1))


def recent_rows(taps: DecoderTaps, kv_heads: int, window: int) -> Tensor:
    """Attention that each token of the row received from the last rows, row by row.

    Args:
        taps: of a layer that ran.
        kv_heads: Hkv; heads that share keys are averaged.
        window: w, how many rows; a shorter row has zeros in front.

    Returns:
        fp32 `[B, Hkv, L, w]`.
    """
    rows = summed("recent_mass", taps, window)
    found = _attention(taps, rows, taps.k()).unflatten(1, (kv_heads, -1)).mean(2)
    here = taps.here[:, None, None, :].expand(-1, kv_heads, rows.shape[1], -1)
    return F.pad(found.gather(3, here).transpose(2, 3), (window - rows.shape[1], 0))


def _attention(taps: DecoderTaps, rows: Tensor, k: Tensor) -> Tensor:
    """Attention of some rows on all keys, fp32 `[B, H, R, S]`."""
    return kernels.attention_rows(taps.q(rows), k, scale=taps.scale, bias=taps.bias(rows), cap=taps.cap)
