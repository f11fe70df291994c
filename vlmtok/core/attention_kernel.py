"""Which attention kernel runs where a mask or a bias is needed: what torch itself says that it chooses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..kernels.dispatch import note

SDPA = "sdpa"
"""Name of the function of torch that chooses among kernels."""
_WORDS = {
    SDPBackend.MATH: "sdpa (math)",
    SDPBackend.FLASH_ATTENTION: "sdpa (flash)",
    SDPBackend.EFFICIENT_ATTENTION: "sdpa (efficient)",
    SDPBackend.CUDNN_ATTENTION: "sdpa (cudnn)",
}
_OTHER = "the host's own"


def note_attention(what: str, name: str, hidden: Tensor, heads: int, width: int, mask: Tensor, times: int = 1) -> None:
    """Counts an attention with a mask by its kernel, for the report; not under torch.compile.

    Args:
        what: what the attention is, as the report calls it.
        name: the host's, of its attention function; empty where it has none.
        hidden: `[B, L, C]`, input of the attention.
        heads: of its queries.
        width: of a head.
        mask: `[B, 1 or H, L or 1, K]`, or the 2-D one of flash attention.
        times: how many such attentions it stands for.
    """
    if not torch.compiler.is_compiling():
        note(what, kernel_of(name, hidden, heads, width, mask), times)


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
    if name != SDPA or mask.dim() != 4:
        return name or _OTHER
    # One row of memory stands for all: the choice looks at sizes and at the stride of the last axis.
    row = hidden.new_empty(width)
    batch, length = hidden.shape[:2]
    q, k = (row.expand(batch, heads, count, width) for count in (length, mask.shape[-1]))
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return _WORDS.get(SDPBackend(torch._fused_sdp_choice(q, k, k, mask, 0.0, False)), SDPA)
