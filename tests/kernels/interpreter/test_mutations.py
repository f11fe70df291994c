"""The checks find bugs: each one put into a copy of a kernel makes its check fail.

A bug is a piece of source and what replaces it; the piece must occur exactly once, so that a kernel that changes
takes its bugs along. None of them writes out of bounds: the interpreter would crash.
"""

import sys
from pathlib import Path

import bugs_cover
import bugs_determinant
import checks
import pytest
from test_kernels import NAMES, modules

import vlmtok.kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

_JOIN = """            for _ in range(0, tl.sum(hit.to(tl.int32), 0)):
                last = next_hit(hit, at + lane, last)
                token = """

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
    # order
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
    # merge
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
    # greedy
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
    "protected tokens merge before those with NaN": (
        "order",
        "value = tl.where(value > -3.4028234663852886e38, value, -3.4028234663852886e38)",
        "value = value + 0.0",
        "plan_complete",
    ),
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
    # transition, received
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
    # columns
    "rows look behind themselves": (
        "columns",
        "look = look & (j[None, :] <= place[:, None])",
        "look = look & (j[None, :] <= place[:, None] + 1)",
        "columns",
    ),
    "keys are seen from in front of them": (
        "columns",
        "look = look & (j[:, None] <= place[None, :])",
        "look = look & (j[:, None] <= place[None, :] + 1)",
        "columns",
    ),
    "a row does not see itself": ("columns", "tl.max(place, 0) + 1)", "tl.max(place, 0))", "columns"),
    "the first row of a tile says where it ends": (
        "columns",
        "tl.max(place, 0) + 1",
        "tl.min(place, 0) + 1",
        "columns",
    ),
    "the tile's last key says who sees it": (
        "columns",
        "place >= origin,",
        "place >= origin + BM - 1,",
        "columns_places",
    ),
    "rows begin a tile late": ("columns", "begin // BN * BN", "tl.cdiv(begin, BN) * BN", "columns"),
    "only the first thousand places are looked at": (
        "columns",
        "for start in range(0, m, 1024):",
        "for start in range(0, tl.minimum(m, 1), 1024):",
        "columns_long",
    ),
    "padding is a key": (
        "columns",
        "look = look & (tl.load(valid + batch * n + j, mask=j < n, other=0) != 0)[None, :]",
        "look = look & (tl.load(valid + batch * n + j, mask=j < n, other=0) >= 0)[None, :]",
        "columns_places",
    ),
    "padding receives a share": ("columns", "tl.where(real, a, 0.0)", "a", "columns_places"),
    "padding is the first row's": (
        "columns",
        "real = tl.load(valid + batch * n + j",
        "real = tl.load(valid + j",
        "columns_places",
    ),
    "places are the first row's": ("columns", "tl.load(at + batch * at_batch + i", "tl.load(at + i", "columns_places"),
    "places of keys are the first row's": (
        "columns",
        "    at += batch * at_batch\n",
        "    at += 0\n",
        "columns_places",
    ),
    "places lie side by side": (
        "columns",
        "place = tl.load(at + i * at_row, mask=i < m, other=-1).to(tl.int32)",
        "place = tl.load(at + i, mask=i < m, other=-1).to(tl.int32)",
        "columns_places",
    ),
    "everybody is of the set": (
        "columns",
        "chosen[None, :], part, 0.0)",
        "chosen[None, :], part, part)",
        "columns_sets",
    ),
    "sets are the first row's": ("columns", "members += batch * SETS * m", "members += 0 * m", "columns_sets"),
    "the third set is the second": ("columns", "c += _of_set(members, 2,", "c += _of_set(members, 1,", "columns_sets"),
    "the fourth set is the third": ("columns", "e += _of_set(members, 3,", "e += _of_set(members, 2,", "columns_sets"),
    "sets are of the first rows": (
        "columns",
        "F.pad(own, (m - own.shape[1], 0))",
        "F.pad(own, (0, m - own.shape[1]))",
        "columns_sets",
    ),
    "a sum of heads is no mean": ("columns", "total / shared", "total", "columns"),
    "one head speaks for those that share keys": (
        "columns",
        "(group * shared + head) * n",
        "(group * shared) * n",
        "columns",
    ),
    "queries read the keys of another head": (
        "columns",
        "k += batch * k_batch + (head // shared) * k_head",
        "k += batch * k_batch + (head // 2) * k_head",
        "columns",
    ),
    "a mask begins at the first key, for rows": (
        "columns",
        "row = (place - (n - rows))[:, None]",
        "row = place[:, None]",
        "columns_masks",
    ),
    "a mask begins at the first key, for keys": (
        "columns",
        "row = (place - (n - rows))[None, :]",
        "row = place[None, :]",
        "columns_masks",
    ),
    "nothing is hidden from rows": (
        "columns",
        "look = look & (_told(mask, row, j[None, :], rows, n, mask_row, mask_column, 0) != 0)",
        "look = look & (_told(mask, row, j[None, :], rows, n, mask_row, mask_column, 0) >= 0)",
        "columns_masks",
    ),
    "nothing is hidden of keys": (
        "columns",
        "look = look & (_told(mask, row, j[:, None], rows, n, mask_row, mask_column, 0) != 0)",
        "look = look & (_told(mask, row, j[:, None], rows, n, mask_row, mask_column, 0) >= 0)",
        "columns_masks",
    ),
    "a mask is turned round": (
        "columns",
        "at = mask + row.to(tl.int64) * mask_row + column.to(tl.int64) * mask_column",
        "at = mask + row.to(tl.int64) * mask_column + column.to(tl.int64) * mask_column",
        "columns_masks",
    ),
    "a mask is in another unit": (
        "columns",
        "return told.to(tl.float32) * 1.4426950408889634",
        "return told.to(tl.float32)",
        "columns_masks",
    ),
    "the cap is in another unit": ("columns", "cap * LOG2E)", "cap)", "columns_capped"),
    "the cap has half its width": ("columns", "* 2.0 * LOG2E / cap", "* LOG2E / cap", "columns_capped"),
    "a NaN reaches all keys of its tile": (
        "columns",
        "part = tl.where(look, tl.exp2(logits - base[None, :]), 0.0)",
        'part = tl.exp2(tl.where(look, logits, float("-inf")) - base[None, :])',
        "columns_not_finite",
    ),
    **bugs_cover.BUGS,
}

BUGS |= bugs_determinant.BUGS


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(bug, tmp_path, monkeypatch):
    name, piece, wrong, check = BUGS[bug]
    source = (Path(vlmtok.kernels.__file__).parent / f"triton_{name}.py").read_text()
    assert source.count(piece) == 1, f"{piece!r} occurs {source.count(piece)} times in triton_{name}.py"
    (tmp_path / f"triton_{name}.py").write_text(source.replace(piece, wrong.replace("BN_", "4096")))
    monkeypatch.setattr(vlmtok.kernels, "__path__", [str(tmp_path), *vlmtok.kernels.__path__])
    for short in NAMES:  # import all anew: they hold on to each other's functions
        monkeypatch.delitem(sys.modules, f"vlmtok.kernels.triton_{short}", raising=False)
        monkeypatch.delattr(vlmtok.kernels, f"triton_{short}", raising=False)
    mutant = modules()
    assert Path(getattr(mutant, name).__file__).parent == tmp_path
    with pytest.raises((AssertionError, IndexError)):
        checks.CHECKS[check](mutant)
