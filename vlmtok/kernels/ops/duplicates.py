"""The op that takes near duplicates out of a list."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...errors import ParameterError
from ..dispatch import choose
from .checks import BOOL, LONG, check_device, check_floating, check_index
from .paths import run_detached


def drop_duplicates(
    x: Tensor, k: int, *, order: Tensor | None = None, step: int = 8, valid: Tensor | None = None
) -> Tensor:
    """Takes rows with a near duplicate out of a list until k are left (VisPruner, arXiv 2412.01818v2).

    In each round a list of length L is dealt into two halves, A (places 0, 2, ...) and B, in turn; of A the rows whose
    nearest one in B, by cosine, is nearest leave, ``min(step, L - k, ceil(L / 2))`` of them; the list is what is left
    of A, by falling cosine, and B behind it.

    No table of all cosines is held on a GPU. On a CPU pictures go one after the other; the cosines of the rows of a
    list are multiplied once (again where it is longer than 8,192, 256 MiB of them), and the 16 nearest of each
    remembered.

    Args:
        x: `[B, N, D]`, any floating dtype.
        k: how many stay, at most M.
        order: int64 `[B, M]`, the lists to begin with, without repeats; None means all rows as they stand.
        step: how many leave in a round, at least 1.
        valid: bool `[B, N]`, rows that count; None means all. The others are taken out of the lists first, so that
            lists may differ in length; where fewer than k are left, they follow in their order.

    Returns:
        int64 `[B, k]`, in the order of the last list. The earlier place wins a tie. A row that is zero or not finite
        compares as 0 to all.
    """
    op = "drop_duplicates"
    check_floating(op, "[B, N, D]", x=x)
    batch, n, _ = x.shape
    if order is None:
        order = torch.arange(n, device=x.device).expand(batch, n)
    if order.dim() != 2 or order.shape[1] > n:
        raise ParameterError(f"{op}: order must be int64 [{batch}, M] with M at most {n}, got {list(order.shape)}")
    check_index(op, (batch, order.shape[1]), LONG, order=order)
    check_index(op, (batch, n), BOOL, valid=valid)
    check_device(op, x, order=order, valid=valid)
    if isinstance(k, bool) or not 0 <= k <= order.shape[1]:
        raise ParameterError(f"{op}: k={k!r} must be in [0, {order.shape[1]}], the length of the lists")
    if isinstance(step, bool) or step < 1:
        raise ParameterError(f"{op}: step={step!r} must be at least 1")
    triton = choose(op, x, batch=batch, pair_bytes=batch * order.shape[1] ** 2)
    return cast(Tensor, run_detached(op, triton, x, order, k, step=step, valid=valid))
