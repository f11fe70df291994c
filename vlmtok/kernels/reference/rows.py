"""Rows of a batch: their length, taking some, adding to some, products of all with all."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .looking import host_may_look

EPS = 1e-12
"""Smallest length by which a row is divided."""

UNORDERED = ("cuda",)
"""Types of devices whose `index_add_` adds in the order in which threads come."""

SMALL = 16
"""Rows and columns from which on MKL multiplies equal rows alike."""
_BLOCKED = 512  # rows from which on half of a square and its mirror cost less than the whole
_BLOCKS = 6  # along a side


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length one, fp32.

    Args:
        x: `[..., D]`, any floating dtype.

    Returns:
        fp32 `[..., D]`. A zero row stays zero; a row whose length is not finite (NaN, infinity, overflow) becomes NaN.
    """
    wide = x.float()
    return _divided(wide, torch.linalg.vector_norm(wide, dim=-1, keepdim=True))


def _divided(wide: Tensor, length: Tensor) -> Tensor:
    return wide / length.clamp_min(EPS).nan_to_num(nan=float("nan"), posinf=float("nan"))


def finite_unit_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`unit_rows` in which a row that is not finite is zero, and which rows are what.

    Args:
        x: `[B, N, D]`, any floating dtype.

    Returns:
        fp32 `[B, N, D]`; bool `[B, N]`, whether a row's length is finite; bool `[B, N]`, whether it is finite and above
        `EPS`, so that the row has length one.
    """
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    finite = length.isfinite()
    finite, whole = finite.squeeze(-1), (finite & (length > EPS)).squeeze(-1)
    return blank(_divided(wide, length), ~finite), finite, whole


def blank(x: Tensor, rows: Tensor, value: float = 0.0) -> Tensor:
    """Sets rows of `x` `[B, N, C]` where `rows` `[B, N]` is true, in place; reads nothing where the host sees none."""
    if host_may_look(x) and not rows.any():
        return x
    return x.masked_fill_(rows.unsqueeze(-1), value)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Some rows of every batch entry; the fast form of gather with an expanded index.

    Args:
        x: `[B, N, C]`, any dtype; gradients flow.
        index: int64 `[B, K]`.

    Returns:
        `[B, K, C]`.
    """
    batch, n, width = x.shape
    flat = flat_index(index, n)
    return x.reshape(batch * n, width).index_select(0, flat).reshape(batch, index.shape[1], width)


def flat_index(index: Tensor, n: int) -> Tensor:
    """Rows `[B, K]` as rows of the flattened `[B n, C]`."""
    batch, step = index.shape[0], max(n, 1)
    if batch == 1:
        return index.reshape(-1)
    return (index + torch.arange(0, batch * step, step, device=index.device).unsqueeze(1)).reshape(-1)


def products(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b^T` in which equal rows, and equal columns, get equal products, so that ties are ties.

    MKL takes small matrices, and the edges of narrow ones, another way than the rest: the order of a sum depends on
    where it stands. In float64 that is far below what rounding to fp32 leaves.

    Args:
        a: fp32 `[B, M, D]`.
        b: fp32 `[B, N, D]`.

    Returns:
        fp32 `[B, M, N]`.
    """
    turned = b.transpose(1, 2)
    if a.device.type == "cpu" and min(a.shape[1], b.shape[1]) < SMALL:
        return (a.double() @ turned.double()).float()
    return a @ turned


def square_products(x: Tensor) -> Tensor:
    """`products(x, x)`, (i, j) and (j, i) equal. On a CPU what is above the diagonal is multiplied, the rest mirrored.

    Args:
        x: fp32 `[B, N, D]`.

    Returns:
        fp32 `[B, N, N]`.
    """
    batch, n, _ = x.shape
    if n < _BLOCKED or not host_may_look(x):
        return mutual(products(x, x))
    table = x.new_empty(batch, n, n)
    cuts = [n * i // _BLOCKS for i in range(_BLOCKS + 1)]
    for rows, out in zip(x, table):
        for first, end in pairwise(cuts):
            torch.mm(rows[first:end], rows[first:].t(), out=out[first:end, first:])
            out[end:, first:end] = out[first:end, end:].t()
    return table


def mutual(similarity: Tensor) -> Tensor:
    """Similarities `[B, N, N]` of rows with themselves in which (i, j) and (j, i) are equal; others as they are.

    Small products round the two apart, and rows that are each other's best must tie.
    """
    if similarity.shape[1] != similarity.shape[2]:
        return similarity
    return similarity.add(similarity.transpose(1, 2)).mul_(0.5)


def unordered(x: Tensor) -> bool:
    """Whether a sum of rows, on the device of `x`, is taken in the order in which threads come."""
    return x.device.type in UNORDERED


def add_rows(out: Tensor, at: Tensor, change: Tensor) -> Tensor:
    """`out.index_add_(0, at, change)` that gives the same bits every run, also where several rows join one."""
    if unordered(out):
        return out.index_put_((at,), change, accumulate=True)
    return out.index_add_(0, at, change)


def accumulator(x: Tensor) -> Tensor:
    """At least fp32, the dtype in which sums are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
