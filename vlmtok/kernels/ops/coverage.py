"""The ops that choose rows one after the other by what they add to a coverage."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...errors import ParameterError
from ..dispatch import choose
from .checks import BOOL, LONG, check_device, check_floating, check_index, check_k
from .paths import run_detached, square_bytes, too_many

_LAST = torch.iinfo(torch.int64).max


def greedy_cover(
    table: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    late: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy choice of k rows by what they add to the coverage of targets (facility location).

    What is covered of a target is the most that any chosen row covers, at first 0; a row adds what it covers beyond
    that, over all targets. Each round takes the row of largest ``weight_j sum_i max(0, table_ji - cover_i)``.

    Args:
        table: `[B, N, R]`, how much each row covers of each of R targets, any floating dtype, taken in fp32. (A target
            of padding is a column of zeros.)
        k: how many, at most N.
        weight: floating `[B, N]`, by which what a row adds is multiplied, negative ones count as 0; None means ones.
        late: int64 `[B, N]`, 0 or less for candidates; others follow behind, lower numbers first. None means all 0.
        valid: bool `[B, N]`, rows that may be chosen; the others follow behind all. None means all.

    Returns:
        The choice in the order taken, int64 `[B, k]`, without repeats, and what each added times its weight, fp32
        `[B, k]`; NaN for rows taken because no candidate was left. The lowest index wins a tie; rows that add what is
        not finite come behind the other candidates, before late ones. On a CPU gains are evaluated lazily, with the
        bits of the plain rule.
    """
    op = "greedy_cover"
    check_floating(op, "[B, N, R]", table=table)
    batch, n, targets = table.shape
    check_k(op, k, n)
    _check_weight(op, (batch, n), weight)
    check_index(op, (batch, n), LONG, late=late)
    check_index(op, (batch, n), BOOL, valid=valid)
    check_device(op, table, weight=weight, late=late, valid=valid)
    if valid is not None:
        late = torch.where(valid, 0 if late is None else late, _LAST)
    triton = choose(op, table, batch=batch, pair_bytes=4 * batch * n * targets, limit=too_many(n))
    return cast("tuple[Tensor, Tensor]", run_detached(op, triton, table, k, weight=weight, late=late))


def greedy_cover_cosine(
    x: Tensor, k: int, *, weight: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy choice of k rows by what they add to the coverage of all, each covering another by their cosine.

    `greedy_cover` of the cosines of all rows with all; negative ones never count. The products of a picture are held up
    to 2 GiB (N = 23,170); beyond, 64 rows of them at a time are multiplied again where they are needed, which asks the
    host for each choice on every device. On a CPU, pictures go one after the other once their tables exceed 8 MiB.

    Args:
        x: `[B, N, D]`, any floating dtype.
        k: how many, at most N.
        weight: floating `[B, N]`, by which what a row adds is multiplied, negative ones count as 0; None means ones.
        valid: bool `[B, N]`, rows that may be chosen and that are to be covered; the others follow behind all. None
            means all.

    Returns:
        As `greedy_cover`. Rows that are not finite, or whose weight is not, cover nothing, need not be covered, and
        follow behind the others.
    """
    op = "greedy_cover_cosine"
    check_floating(op, "[B, N, D]", x=x)
    batch, n, _ = x.shape
    check_k(op, k, n)
    _check_weight(op, (batch, n), weight)
    check_index(op, (batch, n), BOOL, valid=valid)
    check_device(op, x, weight=weight, valid=valid)
    triton = choose(op, x, batch=batch, pair_bytes=square_bytes(x), limit=too_many(n))
    return cast("tuple[Tensor, Tensor]", run_detached(op, triton, x, k, weight=weight, valid=valid))


def _check_weight(op: str, shape: tuple[int, int], weight: Tensor | None) -> None:
    if weight is not None and (tuple(weight.shape) != shape or not weight.is_floating_point()):
        raise ParameterError(f"{op}: weight must be floating {list(shape)}, got {weight.dtype} {list(weight.shape)}")
