"""Bugs of transition statistics and of what keys receive on average; see `test_mutations.py`."""

from __future__ import annotations

BUGS = {
    "the ratio is turned round": ("transition", "ny / tl.maximum(nx", "nx / tl.maximum(ny", "transition"),
    "a zero row has a ratio": ("transition", "tl.where(nx > 0, quotient, 0.0)", "quotient", "transition"),
    "the cosine has no floor": ("transition", "tl.where(nx < 1e-8, 1e-8, nx)", "nx", "transition"),
    "nothing visible poisons the sum": (
        "common",
        'base = tl.where(higher > float("-inf"), higher, 0.0)',
        "base = higher",
        "received_edges",
    ),
    "the sum is not rescaled": ("common", "total * tl.exp2(most - base)", "total", "received"),
    "padding receives": (
        "received",
        'logits = tl.where((j < n)[None, :], logits, float("-inf"))',
        "logits = logits + 0.0",
        "received",
    ),
    "rows that do not exist attend": (
        "received",
        'mask=i < m, other=float("inf"))',
        "mask=i < m, other=0.0)",
        "received",
    ),
    "heads do not share keys": (
        "received",
        "tile_k = load_rows(k + batch * k_batch + (head // shared) * k_head",
        "tile_k = load_rows(k + batch * k_batch + head // 2 * k_head + 0 * shared",
        "received",
    ),
    "the bias is turned round": (
        "received",
        "bias, bias_column, bias_row, BIAS",
        "bias, bias_row, bias_column, BIAS",
        "received",
    ),
    "the mean is a sum over rows": ("received", "/ (heads * m)", "/ heads", "received"),
}
