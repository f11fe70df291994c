"""Which attention kernel runs where a mask or a bias is needed: what torch itself says that it chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from ..kernels.dispatch import note
from . import forms
from .hosts import Host

_WORDS = {
    SDPBackend.MATH: "sdpa (math)",
    SDPBackend.FLASH_ATTENTION: "sdpa (flash)",
    SDPBackend.EFFICIENT_ATTENTION: "sdpa (efficient)",
    SDPBackend.CUDNN_ATTENTION: "sdpa (cudnn)",
}
_SDPA, _EAGER, _OTHER = "sdpa", "eager", "the host's own"


def note_masked(config: Any, hidden: Tensor, mask: Any) -> None:
    """Counts an attention behind a cut that gets a mask, by its kernel, for the report; none without a mask.

    Args:
        config: of the text model.
        hidden: `[B, L, C]`, input of the layer.
        mask: what its attention gets.
    """
    if isinstance(mask, Tensor) and not torch.compiler.is_compiling():
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        note("masked attention behind a cut", kernel_of(forms.implementation_of(config), hidden, heads, width, mask))


def note_biased(attn: Host, hidden: Tensor, heads: int, mask: Tensor | None, sized: bool) -> None:
    """Counts an attention of a tower that gets a mask, or log(size) on its keys, by its kernel.

    Args:
        attn: the attention.
        hidden: `[B, L, C]`, its input.
        heads: of it.
        mask: `[B, 1, L or 1, L]`, what is added to its logits; None stands for one that hides keys.
        sized: whether log(size) is in it.
    """
    if not torch.compiler.is_compiling():
        given = hidden.new_empty(1).expand(hidden.shape[0], 1, 1, hidden.shape[1]) if mask is None else mask
        kernel = kernel_of(_function_of(attn), hidden, heads, hidden.shape[-1] // heads, given)
        note("proportional attention" if sized else "masked attention of a tower", kernel)


def _function_of(attn: Host) -> str:
    """Name of the function that an attention of a tower calls: by its configuration, or as timm and torch have it."""
    attn = forms.inner(attn)
    if name := forms.implementation(attn):
        return name
    fused = getattr(attn, "fused_attn", None)  # of timm
    if fused is None:
        return _SDPA if isinstance(attn, nn.MultiheadAttention) else ""
    return _SDPA if fused else _EAGER


def kernel_of(name: str, hidden: Tensor, heads: int, width: int, mask: Tensor) -> str:
    """The kernel of an attention with a mask.

    Args:
        name: the host's, of its attention function; empty where it has none.
        hidden: `[B, L, C]`, input of the attention.
        heads: of its queries.
        width: of a head.
        mask: `[B, 1 or H, L or 1, K]`, or the 2-D one of flash attention.

    Returns:
        The host's name of its function; for SDPA with the backend that torch chooses for such inputs, under the
        backends that are allowed now.
    """
    if name != _SDPA or mask.dim() != 4:
        return name or _OTHER
    # One row of memory stands for all: the choice looks at sizes and at the stride of the last axis.
    row = hidden.new_empty(width)
    batch, length = hidden.shape[:2]
    q, k = (row.expand(batch, heads, count, width) for count in (length, mask.shape[-1]))
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return _WORDS.get(SDPBackend(torch._fused_sdp_choice(q, k, k, mask, 0.0, False)), _SDPA)
