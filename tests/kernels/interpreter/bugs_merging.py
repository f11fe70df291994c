"""Bugs of merges and their gradient; see `test_mutations.py`."""

from __future__ import annotations

_JOIN = """            for _ in range(0, tl.sum(hit.to(tl.int32), 0)):
                last = next_hit(hit, at + lane, last)
                token = """

BUGS = {
    "the weight is lost": ("merge", "change += own * (joining - kept)", "change += joining - kept", "merge_means"),
    "the mean is a sum": ("merge", "kept + change / whole)", "kept + change)", "merge_means"),
    "one member joins": (
        "merge",
        _JOIN,
        _JOIN.replace("tl.sum(hit.to(tl.int32), 0)", "tl.minimum(tl.sum(hit.to(tl.int32), 0), 1)"),
        "merge_means",
    ),
    "only the first step of entries joins": (
        "merge",
        _JOIN,
        _JOIN.replace("hit.to(tl.int32)", "(hit & (at == 0)).to(tl.int32)"),
        "merge_means",
    ),
    "alone is divided": (
        "merge",
        "tl.where(whole == mass, kept, kept + change / whole)",
        "(kept * whole + change) / whole",
        "merge_is_deterministic_and_alone_is_exact",
    ),
    "the kept row has no weight": ("merge", "weight * kept + change", "kept + change", "merge_weights"),
    "the less important weighs more": ("merge", "tl.exp(mine - theirs)", "tl.exp(theirs - mine)", "merge_pairs"),
    "a pair weighs one": ("merge", "weight = 2.0 / (1.0 + tl.exp", "weight = 1.0 / (1.0 + tl.exp", "merge_pairs"),
    "the kept one weighs the same": ("merge", "share += mass * (1.0 - weight)", "share += 0.0 * weight", "merge_pairs"),
    "a pair has no sizes": ("merge", "change += weight * own * joining", "change += weight * joining", "merge_pairs"),
    "importance counts from the prefix on": (
        "merge",
        "theirs = _entry(importance, token - prefix, inner",
        "theirs = _entry(importance, token - 1, inner",
        "merge_pairs",
    ),
    "the bias is the size": ("merge", "tl.log(whole)", "whole", "merge_biased"),
    "kept tokens count twice": (
        "merge",
        "    for at in range(0, slots, BM):\n        k = at + lane\n        others",
        "    for at in range(0, 0, BM):\n        k = at + lane\n        others",
        "merge_ownership",
    ),
    "a token counts for every entry": (
        "merge",
        "    for at in range(0, entry, BM):\n        e = at",
        "    for at in range(0, 0, BM):\n        e = at",
        "merge_ownership",
    ),
    "empty entries own tokens": (
        "merge",
        "others += (same & used).to(tl.int32)",
        "others += same.to(tl.int32)",
        "merge_ownership",
    ),
    "the prefix is forgotten": (
        "merge",
        "                token = tl.load(src + last * src_step).to(tl.int64) + prefix",
        "                token = tl.load(src + last * src_step).to(tl.int64)",
        "merge_rows_around",
    ),
    "the suffix is the prefix": (
        "merge",
        "token = (n - rows + row).to(tl.int64)",
        "token = (row - slots - prefix).to(tl.int64)",
        "merge_rows_around",
    ),
    "strides of indices are ignored": (
        "merge",
        "tl.load(keep + slot * keep_step, mask=merges",
        "tl.load(keep + slot, mask=merges",
        "merge_views",
    ),
    "empty entries carry a gradient": (
        "merge_grad",
        " == token) & (goal >= 0)",
        " == token) & (goal >= -1)",
        "merge_gradient",
    ),
}
