"""Which attention kernel runs where a mask or a bias is needed: what torch itself says that it chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ...kernels.dispatch import note
from .. import forms

_WORDS = {
    SDPBackend.MATH: "sdpa (math)",
    SDPBackend.FLASH_ATTENTION: "sdpa (flash)",
    SDPBackend.EFFICIENT_ATTENTION: "sdpa (efficient)",
    SDPBackend.CUDNN_ATTENTION: "sdpa (cudnn)",
}


def note_masked(config: Any, hidden: Tensor, mask: Any) -> None:
    """Counts an attention behind a cut that gets a mask, by its kernel, for the report; none without a mask.

    Args:
        config: of the text model.
        hidden: `[B, L, C]`, input of the layer.
        mask: what its attention gets.
    """
    if isinstance(mask, Tensor) and not torch.compiler.is_compiling():
        note("masked attention behind a cut", kernel_of(config, hidden, mask))


def kernel_of(config: Any, hidden: Tensor, mask: Tensor) -> str:
    """The kernel of an attention with a mask.

    Args:
        config: of the text model.
        hidden: `[B, L, C]`, input of the layer.
        mask: `[B, 1 or H, L, K]`, or the 2-D one of flash attention.

    Returns:
        The host's name of its attention function; for SDPA with the backend that torch chooses for such inputs, under
        the backends that are allowed now.
    """
    name = forms.implementation_of(config)
    if name != "sdpa" or mask.dim() != 4:
        return name or "the host's own"
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # One row of memory stands for all: the choice looks at sizes and at the stride of the last axis.
    row = hidden.new_empty(width)
    batch, length = hidden.shape[:2]
    q, k = (row.expand(batch, heads, count, width) for count in (length, mask.shape[-1]))
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return _WORDS.get(SDPBackend(torch._fused_sdp_choice(q, k, k, mask, 0.0, False)), "sdpa")
