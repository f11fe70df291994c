"""Signals of a key-value cache: attention mass that its entries received, and the entries; the table is in `signals`.

A mass is a column sum over rows of queries (`kernels.causal_column_sums`). It is made while a layer's queries are at
hand, so that they do not outlive the layer, and no square of attention is held: what stays is one number for each entry
and key-value head. Masses of one layer are made together, of one product of queries and keys.
"""

from __future__ import annotations

from collections.abc import Collection

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


def apart(names: Collection[str], every: int) -> tuple[list[str], bool]:
    """Masses of a layer that are made together, and whether the last rows are looked at one by one.

    Args:
        names: of `MASSES`, what a method asks for.
        every: of its site. Where entries leave while an answer is written, rows fall out of the window one by one, so
            that each is kept; ``recent_mass`` is then their sum.
    """
    by_row = bool(every) and "recent_mass" in names
    return sorted(name for name in set(names) if not (by_row and name == "recent_mass")), by_row


def queries(names: Collection[str], length: int, text: int, window: int) -> int:
    """Rows of queries that are multiplied for masses made together.

    Args:
        names: of `MASSES`.
        length: L, tokens of the row.
        text: T, of text behind its first picture.
        window: of ``recent_mass``.
    """
    if "attention_mass" in names:  # it has the rows of the others
        return length
    return ("text_mass" in names) * text + ("recent_mass" in names) * min(window, length)


def masses(names: Collection[str], taps: DecoderTaps, kv_heads: int, window: int = 0) -> dict[str, Tensor]:
    """Attention that each token of the row received from some rows.

    Args:
        names: of `MASSES`.
        taps: of a layer that ran.
        kv_heads: Hkv; heads that share keys are averaged.
        window: of ``recent_mass``: how many of the last rows.

    Returns:
        By name, fp32 `[B, Hkv, L]`, after softmax over all that the layer saw.
    """
    assert taps.told is not None  # the layout offers masses where attention has a known form
    rows, sets = _rows(names, taps, window)
    k, (mask, valid), here = taps.k(), taps.told(), taps.here
    if rows.shape[1]:
        q, at, wanted = taps.q(rows), here.gather(1, rows), [*sets.values()]
        sums = kernels.causal_column_sums(
            q, k, scale=taps.scale, at=at, valid=valid, mask=mask, cap=taps.cap, sets=wanted
        )
    else:  # no text
        sums = torch.zeros(len(here), len(sets), kv_heads, k.shape[2], dtype=torch.float32, device=k.device)
    found = sums.gather(3, here[:, None, None, :].expand(-1, len(sets), kv_heads, -1))
    return dict(zip(sets, found.unbind(1)))


def _rows(names: Collection[str], taps: DecoderTaps, window: int) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Rows of queries that masses are sums over, int64 `[B, R]`, and by mass which of the last of these are its."""
    batch, length = taps.here.shape
    device, text, window = taps.here.device, taps.text, min(window, length)
    recent = torch.ones(batch, window, dtype=torch.bool, device=device)
    sets: dict[str, Tensor | None] = {}
    if "attention_mass" in names:
        sets["attention_mass"] = None
        if "text_mass" in names:
            sets["text_mass"] = torch.zeros(batch, length, dtype=torch.bool, device=device).scatter(1, text, True)
        if "recent_mass" in names:
            sets["recent_mass"] = recent
        return torch.arange(length, device=device).expand(batch, -1), sets
    last = torch.arange(length - window, length, device=device).expand(batch, -1)
    if "text_mass" not in names:
        return last, {"recent_mass": None}
    if "recent_mass" not in names:
        return text, {"text_mass": None}
    sets["text_mass"] = torch.cat([torch.ones_like(text, dtype=torch.bool), ~recent], 1)
    return torch.cat([text, last], 1), {**sets, "recent_mass": recent}


def recent_rows(taps: DecoderTaps, kv_heads: int, window: int) -> Tensor:
    """Attention that each token of the row received from the last rows, row by row.

    Args:
        taps: of a layer that ran.
        kv_heads: Hkv; heads that share keys are averaged.
        window: w, how many rows; a shorter row has zeros in front.

    Returns:
        fp32 `[B, Hkv, L, w]`.
    """
    rows, _ = _rows(("recent_mass",), taps, window)
    bias = taps.bias(rows)
    attention = kernels.attention_rows(taps.q(rows), taps.k(), scale=taps.scale, bias=bias, cap=taps.cap)
    found = kernels.per_key_head(attention, kv_heads)
    here = taps.here[:, None, None, :].expand(-1, kv_heads, rows.shape[1], -1)
    return F.pad(found.gather(3, here).transpose(2, 3), (window - rows.shape[1], 0))
