"""Reports that attention behind a cut gets a mask."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from ...core.attention_kernel import note_attention
from .. import forms
from ..account import head_width
from ..hosts import Host
from .masks import RECURRENT


def told_once(kinds: list[str], first: int) -> dict[int, int]:
    """Layers whose masks stand for those of others, since hosts make one for all layers of a type.

    Args:
        kinds: type of each layer.
        first: the first layer that tells of its own.

    Returns:
        The first layer of each type in front of that one, and how many there are; none of a type without attention.
    """
    counts = Counter(kinds[:first])
    return {kinds.index(kind): count for kind, count in counts.items() if kind not in RECURRENT}


def note_masked(config: Any, block: Host, kind: str, hidden: Tensor, mask: Any, layers: int = 1) -> None:
    """Counts an attention behind a cut that gets a mask, by its kernel; none without a mask.

    Args:
        config: of the text model.
        block: the layer.
        kind: its type; one without attention has a mask for other ends.
        hidden: `[B, L, C]`, input of the layer.
        mask: what it gets.
        layers: how many get the same.
    """
    if isinstance(mask, Tensor) and kind not in RECURRENT:
        heads = int(config.num_attention_heads)
        width = head_width(getattr(block, "self_attn", None), int(config.hidden_size), heads)
        name = forms.implementation_of(config)
        note_attention("masked attention behind a cut", name, hidden, heads, width, mask, layers)
