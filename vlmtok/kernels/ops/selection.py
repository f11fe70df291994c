"""The op that chooses rows one after the other."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ...errors import ParameterError
from .. import reference
from ..dispatch import choose
from ..table import LIMIT_GREEDY
from .checks import BOOL, LONG, check_device, check_floating, check_index, check_k, check_word
from .matching import match_max
from .paths import opaque, run_detached, square_bytes

RULES = ("max", "sum")
METRICS = ("cosine", "l2")


def greedy_select(
    x: Tensor,
    k: int,
    start: Tensor | None,
    *,
    rule: str = "max",
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Farthest-first choice of k rows, one after the other.

    Args:
        x: `[B, N, D]`, any floating dtype.
        k: how many, at most N.
        start: int64 `[B]`, the first row chosen, from 0 to N - 1. (Another index is an error of torch's on the torch
            path; the kernel reads nothing foreign and returns it as it is.) None begins with the row whose nearest
            other row is the farthest away by cosine.
        rule: the next row minimises its ``"max"`` similarity to the chosen ones (k-center) or the ``"sum"`` of
            similarities (max-sum diversification).
        metric: ``"cosine"``, or ``"l2"`` for minus the squared Euclidean distance (rule ``"max"`` only).
        valid: bool `[B, N]`, rows that may be chosen; None means all. A row with fewer than k valid ones repeats none:
            it goes on with the invalid ones, lowest index first.

    Returns:
        The choice in the order taken, int64 `[B, k]`, and the state at which each was taken, fp32 `[B, k]`: the
        maximum or the sum of similarities; NaN for the first and for rows taken because no other was left. The lowest
        index wins a tie; rows that are not finite come after the others.
    """
    op = "greedy_select"
    check_floating(op, "[B, N, D]", x=x)
    check_word(op, "rule", rule, RULES)
    check_word(op, "metric", metric, METRICS)
    if rule == "sum" and metric == "l2":
        raise ParameterError(f"{op}: rule='sum' goes with metric='cosine'; a sum of negative distances has no floor")
    batch, n, _ = x.shape
    check_k(op, k, n)
    if start is None and metric == "l2":
        raise ParameterError(f"{op}: start=None goes with metric='cosine'; name the first row for metric='l2'")
    check_index(op, (batch,), LONG, start=start)
    check_index(op, (batch, n), BOOL, valid=valid)
    check_device(op, x, start=start, valid=valid)
    limit = f"{n} rows exceed {LIMIT_GREEDY}, what one program can hold" if n > LIMIT_GREEDY else None
    triton = choose(op, x, batch=batch, pair_bytes=square_bytes(x), limit=limit)
    if start is None and (triton or opaque()):
        nearest, _ = match_max(x, x, exclude_diag=True, valid_b=valid)
        start = reference.most_isolated(nearest, valid)
    return cast("tuple[Tensor, Tensor]", run_detached(op, triton, x, k, start, rule=rule, metric=metric, valid=valid))
