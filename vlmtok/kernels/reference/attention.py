"""Attention of some rows, the mean that each token receives of it, and the bias of proportional attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import exact
from .steps import rows_at_a_time


def attention_rows(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Definition of `vlmtok.kernels.attention_rows`."""
    with exact(q.device):
        return logits_of_rows(q, k, scale, bias, cap).softmax(-1)


def logits_of_rows(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, cap: float | None) -> Tensor:
    """What attention takes the softmax of, fp32 `[B, H, T, L]` of its own; arguments as those of `attention_rows`."""
    batch, heads, rows, width = q.shape
    groups, length = k.shape[1], k.shape[2]
    # Heads that share keys become rows of one product: the keys are not repeated.
    grouped = (q.float() * scale).reshape(batch, groups, heads // max(groups, 1) * rows, width)
    logits = (grouped @ k.float().transpose(-1, -2)).reshape(batch, heads, rows, length)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits if bias is None else logits + bias.float()


def received_attention(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, chunk: int = 256) -> Tensor:
    """Definition of `vlmtok.kernels.received_attention`."""
    with exact(q.device):
        total = q.new_zeros(q.shape[0], k.shape[2], dtype=torch.float32)
        rows = q.shape[2]
        chunk = rows_at_a_time(chunk, 4 * q.shape[0] * q.shape[1] * k.shape[2])
        for at in range(0, rows, chunk):
            part = bias
            if bias is not None and bias.dim() > 1 and bias.shape[-2] > 1:
                part = bias[..., at : at + chunk, :]
            total = total + attention_rows(q[:, :, at : at + chunk], k, scale=scale, bias=part).sum((1, 2))
        return total / max(q.shape[1] * rows, 1)


def log_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """log(size), taken in fp32 and rounded once to `dtype`."""
    with torch.no_grad():
        return torch.log(size, out=size.new_empty(size.shape, dtype=dtype))


def key_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What proportional attention adds to the logits: log(size) per key (ToMe, arXiv 2210.09461, eq. 1).

    Args:
        size: fp32 `[B, N]`.
        dtype: of the queries; the logarithm is taken in fp32 and rounded once.

    Returns:
        `[B, 1, 1, N]`, to be given to `scaled_dot_product_attention` as ``attn_mask``: broadcast, never `N x N`.
    """
    return log_size(size, dtype)[:, None, None, :]
