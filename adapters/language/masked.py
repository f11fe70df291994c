"""Reports that attention behind a cut gets a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.attention_kernel import note_attention
from .. import forms
from ..hosts import Host


def note_masked(config: Any, block: Host, hidden: Tensor, mask: Any) -> None:
    """Counts an attention behind a cut that gets a mask, by its kernel; none without a mask.

    Args:
        config: of the text model.
        block: the layer, whose attention knows its own width: configurations may name several.
        hidden: `[B, L, C]`, input of the layer.
        mask: what its attention gets.
    """
    if isinstance(mask, Tensor):
        heads = config.num_attention_heads
        attn: Any = getattr(block, "self_attn", None)
        width = int(getattr(attn, "head_dim", config.hidden_size // heads))
        name = forms.implementation_of(config)
        note_attention("masked attention behind a cut", name, hidden, heads, width, mask)
