"""Bugs of plans: sorting, and who merges with whom; see `test_mutations.py`."""

from __future__ import annotations

BUGS = {
    "ties sort backwards": (
        "order",
        "packed = (key << 32) | lane.to(tl.int64)",
        "packed = (key << 32) | (BN_ - lane).to(tl.int64)",
        "order_of_scores",
    ),
    "minus zero is below zero": (
        "order",
        "score = tl.where(score == 0, 0.0, score)",
        "score = tl.where(score == 0, score, score)",
        "order_of_scores",
    ),
    "negative scores sort upside down": ("order", "bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits", "order_of_scores"),
    "slots are off by one": ("order", "goal + (scores - r)", "goal + (scores - r) - 1", "plan_bipartite"),
    "even is odd": ("order", "(1 - first + 2 * lane)", "(first + 2 * lane)", "plan_bipartite"),
    "what stays is never sorted": ("order", "        if ASCENDING:\n", "        if False:\n", "plan_bipartite"),
    "halves alternate": (
        "order",
        '{"alternate": _ALTERNATE, "halves": _HALVES}',
        '{"alternate": _HALVES, "halves": _ALTERNATE}',
        "plan_energy",
    ),
    "protected tokens merge": (
        "order",
        'value = tl.where(kept, float("-inf"), value)',
        "value = tl.where(kept, value, value)",
        "plan_complete",
    ),
    "importance is ignored": (
        "order",
        "            value -= tl.load(minus",
        "            value -= 0 * tl.load(minus",
        "plan_complete",
    ),
    "protected tokens merge before those with NaN": (
        "order",
        "value = tl.where(value > -3.4028234663852886e38, value, -3.4028234663852886e38)",
        "value = value + 0.0",
        "plan_complete",
    ),
}
