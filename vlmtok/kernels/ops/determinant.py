"""The op that chooses rows one after the other by the determinant of their cosines."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...errors import ParameterError
from ..dispatch import choose
from .checks import BOOL, check_device, check_floating, check_index, check_k
from .paths import run_detached, square_bytes, too_many

SPLITS = (1, 2)


def greedy_determinant(
    x: Tensor, k: int, *, relevance: Tensor | None = None, valid: Tensor | None = None, split: int = 1
) -> tuple[Tensor, Tensor]:
    """Greedy choice of k rows of large determinant: the MAP of a determinantal point process.

    Wanted is the set S with the greatest det of ``r_i cos(x_i, x_j) r_j`` over S. Each round takes the row of largest
    ``r_i^2 d_i``, d_i the variance (1 at first) that those chosen leave of it: incremental Cholesky (Chen et al. 2018,
    arXiv 1709.05135) of the cosines alone, so that what is spanned by those chosen (d_i at most 1e-6) is told from what
    is merely irrelevant.

    The products of all rows with all are held up to N = 8,192 (256 MiB at a time); beyond, a round multiplies its own
    row. On a CPU pictures go one after the other and only rows that are chosen, or nearly, are multiplied.

    Args:
        x: `[B, N, D]`, any floating dtype.
        k: how many, at most N.
        relevance: floating `[B, N]`, the factors r; NaN and negative ones count as 0. None means ones.
        valid: bool `[B, N]`, rows that may be chosen; None means all. A row with fewer than k valid ones repeats none.
        split: 1, or 2 to choose in two halves apart: of the first ``ceil(N / 2)`` rows ``ceil(k / 2)``, the others of
            the rest. Another choice, in half the rounds, as some inference engines make it.

    Returns:
        The choice in the order taken, int64 `[B, k]` (with ``split=2`` that of the first half, then that of the
        second), and ``r_i^2 d_i`` of each as it was taken, fp32 `[B, k]`. The lowest index wins a tie. Where everything
        left is spanned (k above the rank, zero rows), rows follow by falling relevance, then those that are not finite,
        then those that are not valid, both by index; their gain is NaN.
    """
    op = "greedy_determinant"
    check_floating(op, "[B, N, D]", x=x)
    check_floating(op, "[B, N]", relevance=relevance)
    batch, n, _ = x.shape
    check_k(op, k, n)
    if relevance is not None and tuple(relevance.shape) != (batch, n):
        raise ParameterError(f"{op}: relevance must be [B, N] = {[batch, n]}, got {list(relevance.shape)}")
    if isinstance(split, bool) or split not in SPLITS:
        raise ParameterError(f"{op}: split={split!r} is not possible; one of {', '.join(map(str, SPLITS))}")
    check_index(op, (batch, n), BOOL, valid=valid)
    check_device(op, x, relevance=relevance, valid=valid)
    if split == 2 and n > 1:
        return _in_halves(x, k, relevance, valid)
    return _whole(x, k, relevance, valid)


def _whole(x: Tensor, k: int, relevance: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    op = "greedy_determinant"
    triton = choose(op, x, batch=x.shape[0], pair_bytes=square_bytes(x), limit=too_many(x.shape[1]))
    return cast("tuple[Tensor, Tensor]", run_detached(op, triton, x, k, relevance=relevance, valid=valid))


def _in_halves(x: Tensor, k: int, relevance: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both halves as pictures of one batch; of an odd row the second one is filled up with a row that comes last."""
    batch, n, _ = x.shape
    half, first = -(-n // 2), -(-k // 2)
    if n % 2:
        x = torch.cat([x, x[:, -1:]], 1)
        relevance = None if relevance is None else torch.cat([relevance, relevance[:, -1:]], 1)
        full = torch.ones(batch, n, dtype=torch.bool, device=x.device) if valid is None else valid
        valid = torch.cat([full, full.new_zeros(batch, 1)], 1)
    folded = [None if each is None else each.reshape(2 * batch, half) for each in (relevance, valid)]
    order, gain = _whole(x.reshape(2 * batch, half, x.shape[2]), first, *folded)
    order = order.view(batch, 2, first) + torch.tensor([[0], [half]], device=x.device)
    # A choice begins with the smaller one, so that of the second half the last is left away where k is odd.
    return order.view(batch, 2 * first)[:, :k], gain.view(batch, 2 * first)[:, :k]
