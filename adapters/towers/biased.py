"""Reports that attention of a tower adds log(size) to its logits, or hides keys."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from ...core.attention_kernel import note_attention
from .. import forms
from ..account import head_width
from ..hosts import Host


def note_biased(attn: Host, hidden: Tensor, heads: str, mask: Tensor | None, sized: bool) -> None:
    """Counts an attention of a tower that gets a mask, or log(size) on its keys, by its kernel; not while traced.

    Args:
        attn: the attention.
        hidden: `[B, L, C]`, its input.
        heads: its attribute with the number of them.
        mask: `[B, 1, L or 1, L]`, what is added to its logits; None stands for one that hides keys.
        sized: whether log(size) is in it.
    """
    if torch.compiler.is_compiling():
        return
    count = int(attrgetter(heads)(attn))
    given = hidden.new_empty(1).expand(hidden.shape[0], 1, 1, hidden.shape[1]) if mask is None else mask
    what = "proportional attention" if sized else "masked attention of a tower"
    note_attention(what, forms.function_of(attn), hidden, count, head_width(attn, hidden.shape[-1], count), given)
