"""Bugs of the greedy choice by coverage; see `test_mutations.py`."""

from __future__ import annotations

BUGS = {
    "what is covered counts again": (
        "cover",
        "more = cell - tl.load(cover + at + lane, mask=inside, other=0.0)[None, :]",
        "more = cell",
        "cover_choices",
    ),
    "what is lost counts too": ("cover", "total += tl.where(more < 0, 0.0, more)", "total += more", "cover_choices"),
    "NaN adds nothing": ("cover", "tl.where(more < 0, 0.0, more)", "tl.where(more > 0, more, 0.0)", "cover_tiers"),
    "the first targets alone are covered": (
        "cover",
        "for at in range(0, targets, BN):",
        "for at in range(0, tl.minimum(targets, BN), BN):",
        "cover_choices",
    ),
    "a picture is covered by another": ("cover", "    cover += batch * targets\n", "", "cover_choices"),
    "weights are not asked": ("cover", "    if WEIGHT:\n", "    if WEIGHT and FIRST:\n", "cover_choices"),
    "weights below zero count": ("cover", ".clamp(min=0.0).contiguous()", ".contiguous()", "cover_tiers"),
    "late rows are chosen": (
        "cover",
        "tl.where(place > 0, -place, score)",
        "tl.where(place > 1e9, -place, tl.where(score == score, score, 0.0))",
        "cover_tiers",
    ),
    "late rows come last first": (
        "cover",
        "tl.where(place > 0, -place, score)",
        "tl.where(place > 1e9, -place, tl.where(place > 0, place - 1e6, score))",
        "cover_tiers",
    ),
    "places of rows that follow are a view": (
        "cover",
        "places_behind(first, late).contiguous()",
        "places_behind(first, late)",
        "cover_tiers",
    ),
    "the highest index of a tile wins a tie": (
        "cover",
        "tl.min(tl.where(score == best, i, 2147483647), 0))",
        "tl.max(tl.where(score == best, i, -1), 0))",
        "cover_ties",
    ),
    "the highest tile wins a tie": (
        "cover",
        "pick = tl.min(tl.where(seen == best, at, 2147483647), 0)",
        "pick = tl.max(tl.where(seen == best, at, -1), 0)",
        "cover_ties",
    ),
    "a row covered is chosen again": (
        "cover",
        'tl.store(behind + batch * n + pick, float("inf"))',
        "tl.store(behind + batch * n + pick, 0.0)",
        "cover_ties",
    ),
    "padding is a row": ("cover", 'mask=there, other=float("inf"))', "mask=there, other=0.0)", "cover_tiers"),
    "coverage falls": ("cover", "tl.where(row > covered, row, covered)", "row", "cover_choices"),
    "what is behind has a gain": (
        "cover",
        'tl.where(best >= 0, best, float("nan"))',
        "best",
        "cover_tiers",
    ),
    "tiles of one picture are another's": (
        "cover",
        "value + batch * tiles + lane, mask",
        "value + lane, mask",
        "cover_choices",
    ),
    "the last targets are not covered": (
        "cover",
        "max(1, triton.cdiv(targets, config.n))",
        "max(1, targets // config.n)",
        "cover_choices",
    ),
    "weights of the first pictures serve all": (
        "cover",
        "own = None if weight is None else weight[part]",
        "own = None if weight is None else weight[:group]",
        "cover_cosines",
    ),
}
