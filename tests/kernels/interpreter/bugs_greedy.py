"""Bugs of the greedy choice by distance; see `test_mutations.py`."""

from __future__ import annotations

BUGS = {
    "the greatest similarity is picked": (
        "greedy",
        "least = tl.min(state, 0)",
        "least = tl.max(tl.where(state < LAST, state, -LAST), 0)",
        "greedy_choices",
    ),
    "the highest index wins a tie": (
        "greedy",
        "pick = tl.min(tl.where(state == least, j, 2147483647), 0)",
        "pick = tl.max(tl.where(state == least, j, -1), 0)",
        "greedy_ties",
    ),
    "a chosen row is chosen again": (
        "greedy",
        'row = tl.where(j == pick, float("inf"), row)',
        "row = tl.where(j == pick, row, row)",
        "greedy_ties",
    ),
    "the sum is a maximum": (
        "greedy",
        "            state += row",
        "            state = tl.maximum(state, row)",
        "greedy_choices",
    ),
    "the pivot is chosen again": ("greedy", "there & (j != pick)", "there", "greedy_ties"),
    "masked rows are chosen": (
        "greedy",
        "state = tl.where(allowed, state, 2.0 * LAST)",
        "state = tl.where(allowed, state, state)",
        "greedy_tiers",
    ),
    "NaN is a number": (
        "greedy",
        "state = tl.where(tl.load(norm + j, mask=there, other=0.0) < FAR, state, LAST)",
        "state = state + 0.0",
        "greedy_tiers",
    ),
    "a length whose double overflows is near": (
        "greedy",
        '1.7e38 if METRIC else float("inf")',
        'float("inf")',
        "greedy_far",
    ),
    "a cosine has one length": ("greedy", "value * (mine * theirs)", "value * theirs", "greedy_choices"),
    "a distance has one square": ("greedy", "2.0 * value - mine - theirs", "2.0 * value - theirs", "greedy_choices"),
    "a picture's products are another's": (
        "greedy",
        "    gram += batch * n * n\n",
        "    gram += batch * n\n",
        "greedy_choices",
    ),
}
