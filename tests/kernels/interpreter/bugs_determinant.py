"""Bugs of the choice by determinants and of the removal of near duplicates; see `test_mutations.py`."""

from __future__ import annotations

BUGS = {
    # determinant
    "the smallest gain is picked": (
        "determinant",
        "        best = tl.max(key, 0)\n",
        "        best = tl.min(tl.where(key >= 0, key, 2147483647), 0)\n",
        "determinant_choices",
    ),
    "the highest index wins a determinant's tie": (
        "determinant",
        "pick = tl.min(tl.where(key == best, j, 2147483647), 0)",
        "pick = tl.max(tl.where(key == best, j, -1), 0)",
        "determinant_ties",
    ),
    "a part's highest index wins a tie": (
        "determinant",
        "pick = tl.min(tl.where(key == top, j, 2147483647), 0)",
        "pick = tl.max(tl.where(key == top, j, -1), 0)",
        "determinant_ties",
    ),
    "the last part wins a tie": (
        "determinant",
        "pick = tl.min(tl.where(key == top, places, 2147483647), 0)",
        "pick = tl.max(tl.where(key == top, places, -1), 0)",
        "determinant_ties",
    ),
    "relevance is not squared": (
        "determinant",
        "(weight * weight * left)",
        "(weight * left)",
        "determinant_choices",
    ),
    "relevance below 0 is relevance": (
        "determinant",
        "tl.where(weight > 0, tl.minimum(weight, 3.4028234663852886e38), 0.0)",
        "tl.where(weight == weight, tl.minimum(weight, 3.4028234663852886e38), 0.0)",
        "determinant_tiers",
    ),
    "strides of relevance are ignored": (
        "determinant",
        "tl.load(relevance + first + j * step,",
        "tl.load(relevance + first + j + 0 * step,",
        "determinant_spanned",
    ),
    "what is spanned has variance": (
        "determinant",
        "tl.where(left > SPANNED, (weight",
        "tl.where(left > -1.0, (weight",
        "determinant_spanned",
    ),
    "a zero row has variance": (
        "determinant",
        "tl.where(free & (theirs < 0.9999 / EPS), 1.0, 0.0)",
        "tl.where(free, 1.0, 0.0)",
        "determinant_tiers",
    ),
    "rows that are not valid come before those that are not finite": (
        "determinant",
        "late = tl.where(allowed, late, late - n)",
        "late = tl.where(allowed, late - n, late)",
        "determinant_tiers",
    ),
    "rows that are not valid are chosen": (
        "determinant",
        "        free = free & allowed\n",
        "",
        "determinant_tiers",
    ),
    "a chosen row is chosen once more": (
        "determinant",
        "behind = tl.where(j == pick, -0x80000000, behind)",
        "behind = tl.where(j == pick, behind, behind)",
        "determinant_ties",
    ),
    "a chosen row is chosen in two rounds": (
        "determinant",
        "after = tl.where(j == pick, -0x80000000, after)",
        "after = tl.where(j == pick, after, after)",
        "determinant_ties",
    ),
    "a chosen row keeps its variance": (
        "determinant",
        "left = tl.where(j == pick, 0.0, left - step * step)",
        "left = tl.where(j == pick, left, left - step * step)",
        "determinant_choices",
    ),
    "a chosen row keeps its variance from round to round": (
        "determinant",
        "own = tl.where(j == pick, 0.0, own - step * step)",
        "own = tl.where(j == pick, own, own - step * step)",
        "determinant_choices",
    ),
    "the last factors are lost": (
        "determinant",
        "for first in range(0, t, AHEAD):",
        "for first in range(0, t - AHEAD, AHEAD):",
        "determinant_choices",
    ),
    "factors that do not exist count": (
        "determinant",
        "        use = first + lane < t\n",
        "        use = first + lane < t + 1\n",
        "determinant_choices",
    ),
    "the newest factor is forgotten": (
        "determinant",
        "tl.where(top >= 0, t - 1, 0), AHEAD, BN)",
        "tl.where(top >= 0, tl.maximum(t - 2, 0), 0), AHEAD, BN)",
        "determinant_choices",
    ),
    "a factor is not divided": (
        "determinant",
        "row / tl.sqrt(tl.maximum(variance, SPANNED))",
        "row + 0 * variance",
        "determinant_choices",
    ),
    "a round's factor is not divided": (
        "determinant",
        "row / tl.sqrt(tl.maximum(theirs, SPANNED))",
        "row + 0 * theirs",
        "determinant_choices",
    ),
    "a place is a gain": (
        "determinant",
        'tl.where(best >= 0, best.to(tl.float32, bitcast=True), float("nan"))',
        "best.to(tl.float32, bitcast=True)",
        "determinant_spanned",
    ),
    "a round looks into another's parts": (
        "determinant",
        "found = ((t - 1) % 2 * batches + batch) * parts + lane",
        "found = (t - 1) % 2 * batches * parts + lane",
        "determinant_choices",
    ),
    "features of another row are multiplied": (
        "determinant",
        "x + pick.to(tl.int64) * x_row + at + feature",
        "x + at + feature",
        "determinant_choices",
    ),
    "the last features are not multiplied": (
        "determinant",
        "for at in range(0, d, BK):",
        "for at in range(0, d - BK, BK):",
        "determinant_choices",
    ),
    "a picture's factors are another's": (
        "determinant",
        "        factors += batch * k * n\n        row",
        "        factors += batch * n\n        row",
        "determinant_alone",
    ),
    # duplicates
    "those that are far leave": (
        "duplicates",
        "_falling(tl.load(nearest + lane",
        "_falling(0.0 - tl.load(nearest + lane",
        "duplicates_lists",
    ),
    "one more leaves": ("duplicates", "count - step, keep)", "count - step - 1, keep)", "duplicates_lists"),
    "the second half leaves too": ("duplicates", ", keep), count // 2)", ", keep), 0)", "duplicates_lists"),
    "the second half stands first": (
        "duplicates",
        "tl.where(done, 2 * lane + 1, mine - leave + lane)",
        "tl.where(done, 2 * lane + 1, lane)",
        "duplicates_lists",
    ),
    "a list that is short enough is dealt": (
        "duplicates",
        "done = count <= keep",
        "done = count < keep",
        "duplicates_lengths",
    ),
    "places that do not count are compared with": (
        "duplicates",
        "token = tl.load(filler + batch)",
        "token = tl.load(first)",
        "duplicates_lengths",
    ),
    "every list is as long as the first": (
        "duplicates",
        "tl.load(length + batch)",
        "tl.load(length)",
        "duplicates_lengths",
    ),
    "a row that is not finite is nearest to none": (
        "duplicates",
        "x.masked_fill(bad.unsqueeze(-1), 0.0)",
        "x",
        "duplicates_not_finite",
    ),
}
