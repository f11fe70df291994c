"""Reports that attention behind a cut gets a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.attention_kernel import note_attention
from .. import forms
from ..account import head_width
from ..hosts import Host


def note_masked(config: Any, block: Host, hidden: Tensor, mask: Any) -> None:
    """Counts an attention behind a cut that gets a mask, by its kernel; none without a mask.

    Args:
        config: of the text model.
        block: the layer.
        hidden: `[B, L, C]`, input of the layer.
        mask: what its attention gets.
    """
    if isinstance(mask, Tensor):
        heads = int(config.num_attention_heads)
        width = head_width(getattr(block, "self_attn", None), int(config.hidden_size), heads)
        note_attention("masked attention behind a cut", forms.implementation_of(config), hidden, heads, width, mask)
