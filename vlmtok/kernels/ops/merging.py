"""The ops that merge rows, and their gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ...errors import ParameterError
from .. import library, reference
from ..dispatch import choose
from ..reference.rows import unordered
from .checks import LONG, check_device, check_floating, check_index
from .paths import opaque


def merge_rows(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    keep_weight: Tensor | None = None,
    src_weight: Tensor | None = None,
    importance: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gathers the kept rows and adds the joining rows to them (see `vlmtok.Reduction` for the meaning).

    Args:
        x: `[B, prefix + N + suffix, C]`, any floating dtype; gradients flow.
        size: fp32 `[B, prefix + N + suffix]`; no gradient.
        keep: int64 `[B, K]`; keep, src and dst count from the first row behind the prefix.
        src: int64 `[B, R]`; of an empty entry it may be -1 too.
        dst: int64 `[B, R]`, -1 for an empty entry.
        keep_weight: fp32 `[B, K]`, or None for the size-weighted mean; gradients flow.
        src_weight: fp32 `[B, R]`, or None; gradients flow.
        importance: fp32 `[B, N]`, in place of both weights, which are then `vlmtok.kernels.pair_weights`; gradients
            flow.
        prefix: rows in front that stay as they are.
        suffix: rows behind that stay as they are.

    Returns:
        The rows `[B, prefix + K + suffix, C]` in the dtype of `x`, and their sizes, fp32. Sums are accumulated in fp32;
        a slot that nothing joins is its kept row, bit for bit, where there are no weights.
    """
    plan = (x, size, keep, src, dst)
    rows, total = _merged("merge_rows", plan, keep_weight, src_weight, importance, prefix, suffix)
    return rows, total


def merge_rows_biased(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    keep_weight: Tensor | None = None,
    src_weight: Tensor | None = None,
    importance: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_rows`, and log(size) of its rows on the way: on the Triton path, proportional attention costs no launch.

    Args:
        x: as there, and so are all others.
        size: fp32 `[B, prefix + N + suffix]`.
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`.
        keep_weight: fp32 `[B, K]`, or None.
        src_weight: fp32 `[B, R]`, or None.
        importance: fp32 `[B, N]`, or None.
        prefix: rows in front that stay as they are.
        suffix: rows behind that stay as they are.

    Returns:
        Rows and sizes as of `merge_rows`, and log(size) `[B, prefix + K + suffix]` in the dtype of `x`, what `key_bias`
        gives as `[B, 1, 1, L]`.
    """
    plan = (x, size, keep, src, dst)
    rows, total, bias = _merged("merge_rows_biased", plan, keep_weight, src_weight, importance, prefix, suffix)
    return rows, total, bias


def _merged(
    op: str, plan: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], keep_weight: Tensor | None,
    src_weight: Tensor | None, importance: Tensor | None, prefix: int, suffix: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Checks a merge, chooses its path and runs it."""
    x, size, keep, src, dst = plan = (plan[0], plan[1].detach(), *plan[2:])
    _check_merge(op, x, size, keep, src, dst, keep_weight, src_weight, importance, prefix, suffix)
    if prefix + keep.shape[1] + suffix == 0:
        return (x[:, :0], size[:, :0], x.new_empty(x.shape[0], 0))[: 3 if op == "merge_rows_biased" else 2]
    settings = {"keep_weight": keep_weight, "src_weight": src_weight, "prefix": prefix, "suffix": suffix}
    triton = choose("merge_rows", x, batch=x.shape[0])  # one kernel, one name in reports
    if not triton and not (opaque() and unordered(x)):
        definition = getattr(reference, op)
        return cast("tuple[Tensor, ...]", definition(*plan, importance=importance, **settings))
    path = "triton" if triton else "torch"
    weights = (x, keep_weight, src_weight, importance)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in weights):
        if importance is not None:  # written out in torch, which has their gradient
            inner = size[:, prefix : size.shape[1] - suffix]
            keep_weight, src_weight = reference.pair_weights(keep, src, dst, importance, inner)
        return cast("tuple[Tensor, ...]", MergeRows.apply(op, *plan, keep_weight, src_weight, prefix, suffix, path))
    with torch.no_grad():
        return cast("tuple[Tensor, ...]", library.call(op, *plan, importance=importance, **settings, path=path))


def _check_merge(
    op: str, x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor, keep_weight: Tensor | None,
    src_weight: Tensor | None, importance: Tensor | None, prefix: int, suffix: int,
) -> None:  # fmt: skip
    check_floating(op, "[B, N, C]", x=x)
    batch, n, _ = x.shape
    check_floating(op, "[B, N]", size=size)
    if size.dtype in (torch.float16, torch.bfloat16):
        raise ParameterError(f"{op}: size must be torch.float32, got {size.dtype}, which cannot count patches")
    if tuple(size.shape) != (batch, n):
        raise ParameterError(f"{op}: size must be [B, N] = {[batch, n]}, got {list(size.shape)}")
    if keep.dim() != 2 or src.dim() != 2:
        raise ParameterError(f"{op}: keep and src must be [B, K] and [B, R], got {keep.dim()} and {src.dim()} axes")
    check_index(op, (batch, keep.shape[1]), LONG, keep=keep)
    check_index(op, (batch, src.shape[1]), LONG, src=src, dst=dst)
    if (keep_weight is None) != (src_weight is None):
        raise ParameterError(f"{op}: keep_weight and src_weight are given together, or neither")
    if keep_weight is not None and src_weight is not None:
        if importance is not None:
            raise ParameterError(f"{op}: weights are given, or the importance that they follow from, not both")
        check_floating(op, "[B, K]", keep_weight=keep_weight, src_weight=src_weight)
        if keep_weight.shape != keep.shape or src_weight.shape != src.shape:
            raise ParameterError(f"{op}: weights must have the shapes of keep and src")
    if prefix < 0 or suffix < 0 or prefix + suffix > n:
        raise ParameterError(f"{op}: prefix={prefix} and suffix={suffix} do not fit in {n} rows")
    inner = (batch, n - prefix - suffix)
    if importance is not None and (tuple(importance.shape) != inner or not importance.is_floating_point()):
        raise ParameterError(
            f"{op}: importance must be floating [B, N] = {list(inner)}, got {importance.dtype} {list(importance.shape)}"
        )
    check_device(
        op, x, size=size, keep=keep, src=src, dst=dst, keep_weight=keep_weight, src_weight=src_weight,
        importance=importance,
    )  # fmt: skip


class MergeRows(torch.autograd.Function):
    """Gradient of the opaque merge: for x by the transposed map, for the weights by row products."""

    @staticmethod
    def forward(
        ctx: Any, op: str, x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor,
        keep_weight: Tensor | None, src_weight: Tensor | None, prefix: int, suffix: int, path: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Runs the op; sizes and their logarithms carry no gradient."""
        made = library.call(
            op, x, size, keep, src, dst, keep_weight=keep_weight, src_weight=src_weight,
            prefix=prefix, suffix=suffix, path=path,
        )  # fmt: skip
        total = made[1]
        weighted = keep_weight is not None
        ctx.save_for_backward(x if weighted else None, size, keep, src, dst, keep_weight, src_weight, total)
        ctx.edges, ctx.path, ctx.n = (prefix, suffix), path, x.shape[1]
        ctx.mark_non_differentiable(*made[1:])
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for x, keep_weight and src_weight."""
        x, size, keep, src, dst, keep_weight, src_weight, total = ctx.saved_tensors
        prefix, suffix = ctx.edges
        slot, src = dst.clamp(min=0), src.clamp(min=0)
        kept, joined = keep_weight, src_weight
        if kept is None or joined is None:
            inner = total[:, prefix : total.shape[1] - suffix]
            mine = size.gather(1, keep + prefix)
            tiny = torch.finfo(torch.float32).tiny
            kept = torch.where(inner == mine, 1.0, mine / inner.clamp_min(tiny))
            joined = size.gather(1, src + prefix) / inner.gather(1, slot).clamp_min(tiny)
        grads: list[Tensor | None] = [None] * 11
        if ctx.needs_input_grad[1]:
            grads[1] = library.call(
                "merge_rows_grad", grad, keep, src, dst, kept, joined, ctx.n, prefix, suffix, path=ctx.path
            )
        wide = torch.promote_types(grad.dtype, torch.float32)
        if ctx.needs_input_grad[6]:
            mine = reference.take_rows(x, keep + prefix).to(wide)
            slots = grad[:, prefix : grad.shape[1] - suffix].to(wide)
            grads[6] = (mine * slots).sum(-1).to(keep_weight.dtype)
        if ctx.needs_input_grad[7]:
            theirs = reference.take_rows(grad, slot + prefix).to(wide)
            dot = (reference.take_rows(x, src + prefix).to(wide) * theirs).sum(-1)
            grads[7] = torch.where(dst < 0, 0.0, dot).to(src_weight.dtype)
        return tuple(grads)
