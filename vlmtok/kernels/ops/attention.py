"""The ops that give attention of some rows, and what each token receives of it."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ...errors import ParameterError
from ..dispatch import choose, note
from ..table import LIMIT_HEAD
from .checks import check_device, check_floating
from .paths import run_detached, too_wide


def attention_rows(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Softmax attention of some query rows, in fp32.

    Args:
        q: `[B, H, T, d]`.
        k: `[B, Hkv, L, d]`; Hkv divides H (grouped-query attention).
        scale: factor of the logits.
        bias: what is added to the logits, broadcastable to `[B, H, T, L]`, or None.
        cap: soft cap of the logits before the bias, ``cap tanh(logits / cap)``, or None.

    Returns:
        fp32 `[B, H, T, L]`. A row that may look nowhere (bias -inf everywhere) is NaN, as in torch's softmax.
    """
    _check_attention("attention_rows", q, k, bias)
    note("attention_rows", "torch")  # a few rows make no N x N: torch suffices
    return cast(Tensor, run_detached("attention_rows", False, q, k, scale=scale, bias=bias, cap=cap))


def received_attention(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, chunk: int = 256) -> Tensor:
    """Attention that each token receives: the mean over heads and query rows, no `[L, L]` kept.

    Args:
        q: `[B, H, L, d]`.
        k: `[B, Hkv, L, d]`.
        scale: factor of the logits.
        bias: broadcastable to `[B, H, L, L]`, or None.
        chunk: query rows per step.

    Returns:
        fp32 `[B, L]`; a row sums to 1.
    """
    op = "received_attention"
    _check_attention(op, q, k, bias)
    if chunk < 1:
        raise ParameterError(f"{op}: chunk={chunk!r} must be at least 1")
    limit = too_wide(q, k)
    if q.shape[3] > LIMIT_HEAD:
        limit = f"a head width of {q.shape[3]} exceeds {LIMIT_HEAD}"
    pair_bytes = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    triton = choose(op, q, batch=q.shape[0], pair_bytes=pair_bytes, limit=limit)
    return cast(Tensor, run_detached(op, triton, q, k, scale=scale, bias=bias, chunk=chunk))


def check_heads(op: str, q: Tensor, k: Tensor) -> None:
    """Queries and keys of one batch and width, and key-value heads that queries' heads can share."""
    check_floating(op, "[B, H, T, d]", q=q)
    check_floating(op, "[B, Hkv, L, d]", k=k)
    heads, groups = q.shape[1], k.shape[1]
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or (heads % groups if groups else heads):
        raise ParameterError(f"{op}: q {list(q.shape)} and k {list(k.shape)}: B and d must agree and Hkv divide H")


def _check_attention(op: str, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    check_heads(op, q, k)
    if bias is not None and (not bias.is_floating_point() or bias.dim() > 4):
        raise ParameterError(f"{op}: bias must be floating, [B, H, T, L] or broadcastable, got {bias.dtype}")
    wanted = (*q.shape[:3], k.shape[2])
    if bias is not None and any(have not in (1, want) for have, want in zip(bias.shape[::-1], wanted[::-1])):
        raise ParameterError(f"{op}: bias {list(bias.shape)} does not broadcast to [B, H, T, L] = {list(wanted)}")
    check_device(op, q, k=k, bias=bias)
