"""Bugs of cosines, matches and energies; see `test_mutations.py`."""

from __future__ import annotations

BUGS = {
    # match
    "a later tile wins a tie": ("match", "better = similarity > best ", "better = similarity >= best ", "match_ties"),
    "a later lane wins a tie": (
        "match",
        "column = tl.min(tl.where(best == top[:, None]",
        "column = tl.max(tl.where(best == top[:, None]",
        "match_ties",
    ),
    "padding is a column": ("match", 'mask=there_b, other=float("nan"))', "mask=there_b, other=1.0)", "match_negative"),
    "padding is a column, measured inside": (
        "match",
        'right = tl.where(there_b, tile_scale(tile_b, EPS), float("nan"))',
        "right = tile_scale(tile_b, EPS)",
        "match_negative",
    ),
    "columns are not scaled": (
        "match",
        "(left[:, None] * right[None, :])",
        "(left[:, None] + 0 * right[None, :])",
        "match_scales",
    ),
    "rows are not scaled": (
        "match",
        "(left[:, None] * right[None, :])",
        "(0 * left[:, None] + right[None, :])",
        "match_scales",
    ),
    "halves are not widened": ("common", "if UPCAST:", "if UPCAST and False:", "match_values"),
    "rank is not strict": (
        "match",
        "theirs[None, :] > mine[:, None]",
        "theirs[None, :] >= mine[:, None]",
        "match_masks",
    ),
    "rank is upside down": (
        "match",
        "theirs[None, :] < mine[:, None]",
        "theirs[None, :] > mine[:, None]",
        "match_by_score",
    ),
    "equal scores do not rank": ("match", "j[None, :] > i[:, None]", "j[None, :] >= i[:, None]", "match_by_score"),
    "the diagonal is a column": ("match", "i[:, None] != j[None, :]", "i[:, None] != 1 + j[None, :]", "match_masks"),
    "masked columns are free": (
        "match",
        'right = tl.where(free, right, float("nan"))',
        "right = tl.where(free, right, right)",
        "match_masks",
    ),
    "the mask belongs to the first picture": (
        "match",
        "valid_b + batch * valid_batch + row_b",
        "valid_b + row_b",
        "match_masks",
    ),
    "the last tile is lost": (
        "match",
        "for start in range(0, n, BN):",
        "for start in range(0, n - BN, BN):",
        "match_values",
    ),
    "the last features are lost": (
        "match",
        "for k in range(0, d, BK):",
        "for k in range(0, d - BK, BK):",
        "match_values",
    ),
    "the tile's first column is returned": (
        "match",
        "origin + lane[None, :]",
        "origin + 0 * lane[None, :]",
        "match_values",
    ),
    "overflowing lengths are lengths": (
        "common",
        'return tl.where(length < float("inf"), 1.0',
        "return tl.where(length == length, 1.0",
        "match_not_finite",
    ),
    "the batch's stride is ignored": (
        "common",
        "(row // n).to(tl.int64) * x_batch",
        "(row // n).to(tl.int64) * n * x_row",
        "scale_rows",
    ),
    "lengths have no floor": (
        "common",
        'return tl.where(length < float("inf"), 1.0 / tl.maximum(length, EPS)',
        'return tl.where(length < float("inf"), 1.0 / length',
        "scale_rows",
    ),
    "every picture asks the same": (
        "common",
        "asks = query + (row // n).to(tl.int64) * query_batch",
        "asks = query + (row // n).to(tl.int64) * 0",
        "scale_and_ask",
    ),
    "the query has no length": (
        "common",
        "* value * _inverse(asked, EPS)",
        "* value",
        "scale_and_ask",
    ),
    "a NaN is important": (
        "common",
        "tl.where(likeness == likeness, likeness, 0.0)",
        "likeness",
        "scale_and_ask",
    ),
    # energy
    "padding has energy": (
        "energy",
        "over = dots * left[:, None] - tl.where(there_b, margin, PADDING)[None, :]",
        "over = dots * left[:, None] - margin",
        "energy_values",
    ),
    "alpha is lost": ("energy", "alpha * (low - n)", "(low - n)", "energy_values"),
    "the margin is lost": ("energy", "    margin *= unit\n", "    margin *= 0\n", "energy_values"),
    "missing columns are not made up for": (
        "energy",
        "low += count * (zero_low - 1.0)",
        "low += 0 * count",
        "energy_not_finite",
    ),
    "a row that is not finite is NaN": (
        "energy",
        "high = tl.where(bad, zero_high * n, high)",
        "high = tl.where(bad, high, high)",
        "energy_not_finite",
    ),
    "elu counts like the paper": (
        "energy",
        "if KIND == 1:\n                above",
        "if KIND != 2:\n                above",
        "energy_values",
    ),
    "the Gaussian has no width": (
        "energy",
        "unit = SQRT_HALF_LOG2E / (1.0 - margin)",
        "unit = SQRT_HALF_LOG2E",
        "energy_values",
    ),
}
