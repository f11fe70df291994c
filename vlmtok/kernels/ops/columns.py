"""The op that sums attention by key-value head and key, over sets of query rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...errors import ParameterError
from ..dispatch import choose
from ..table import LIMIT_HEAD, LIMIT_SETS
from .attention import check_heads
from .checks import BOOL, LONG, check_device, check_index
from .paths import run_detached, too_wide


def causal_column_sums(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    at: Tensor | None = None,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    cap: float | None = None,
    sets: Sequence[Tensor | None] = (None,),
) -> Tensor:
    """Attention that each key receives, summed over sets of query rows; heads that share keys are averaged.

    No square of attention is held on either path, and several sets take one product of queries and keys.

    Args:
        q: `[B, H, R, d]`, queries, in any order.
        k: `[B, Hkv, S, d]`; Hkv divides H (grouped-query attention).
        scale: factor of the logits.
        at: int64 `[B, R]`, place of each query among the keys; None: the queries are those of the last R keys.
        valid: bool `[B, S]`, keys that are no padding; None: all are.
        mask: bool or floating `[B or 1, 1 or H, L, S]`, as the layer has it, where causality and `valid` are not all:
            which keys each of the last L keys sees as a query, or what is added to its logits. It says all then, and
            is read at the rows that `at` names.
        cap: soft cap of the logits before the mask, ``cap tanh(logits / cap)``, or None.
        sets: of each set of rows, which of the last n rows of q it has, bool `[B, n]` with a width of its own, or None
            for all R rows.

    Returns:
        fp32 `[B, sets, Hkv, S]`, sums of what softmax gives over all that a row sees. A row outside a set, or that sees
        no key, adds nothing (one whose mask is -inf everywhere adds NaN, as torch's softmax has it); a NaN reaches the
        keys that its row sees.

    Raises:
        ParameterError: shapes, dtypes or devices do not fit.
        KernelError: the mode is ``"triton"`` and d exceeds 256, or there are more than 4 sets.
    """
    op = "causal_column_sums"
    check_heads(op, q, k)
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    if at is None and rows > keys:
        raise ParameterError(f"{op}: {rows} queries are not the last of {keys} keys; say where they stand with at=")
    check_index(op, (batch, rows), LONG, at=at)
    check_index(op, (batch, keys), BOOL, valid=valid)
    check_device(op, q, k=k, at=at, valid=valid, mask=mask)
    _check_mask(op, mask, valid, at, (batch, heads, rows, keys))
    if cap is not None and not cap > 0:
        raise ParameterError(f"{op}: cap={cap!r} must be positive, or None")
    if not sets:
        raise ParameterError(f"{op}: sets is empty; (None,) is all rows")
    for number, members in enumerate(sets):
        if members is not None and not (
            members.dtype == torch.bool and members.dim() == 2 and len(members) == batch and members.shape[1] <= rows
        ):
            found = f"{members.dtype} {list(members.shape)}"
            raise ParameterError(f"{op}: sets[{number}] must be bool [{batch}, at most {rows}], got {found}")
        check_device(op, q, **{f"sets[{number}]": members})
    limit = too_wide(q, k)
    if width > LIMIT_HEAD:
        limit = f"a head width of {width} exceeds {LIMIT_HEAD}"
    if len(sets) > LIMIT_SETS:
        limit = f"{len(sets)} sets of rows exceed {LIMIT_SETS}"
    triton = choose(op, q, batch=batch, pair_bytes=4 * batch * heads * rows * keys, limit=limit)
    settings = {"scale": scale, "at": at, "valid": valid, "mask": mask, "cap": cap}
    return cast(Tensor, run_detached(op, triton, q, k, **settings, sets=list(sets)))


def _check_mask(
    op: str, mask: Tensor | None, valid: Tensor | None, at: Tensor | None, sizes: tuple[int, int, int, int]
) -> None:
    if mask is None:
        return
    batch, heads, rows, keys = sizes
    if valid is not None:
        raise ParameterError(f"{op}: mask says all; give it or valid, not both")
    kind = mask.dtype == torch.bool or mask.is_floating_point()
    if not kind or mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        found = f"{mask.dtype} {list(mask.shape)}"
        raise ParameterError(
            f"{op}: mask must be bool or floating [{batch} or 1, {heads} or 1, L, {keys}], got {found}"
        )
    if mask.shape[3] != keys or mask.shape[2] > keys or (at is None and mask.shape[2] < rows):
        raise ParameterError(
            f"{op}: mask {list(mask.shape)} must have {keys} columns, and a row for each query, {rows} to {keys}"
        )
