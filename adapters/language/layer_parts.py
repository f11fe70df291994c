"""Parts of a language model that signals beside attention are tapped at: its last norm, the last maps of its MLPs."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention import branches

_FINAL_NORMS = ("norm", "embedding_norm", "final_layernorm")
_LAST_MAPS = ("down_proj", "w2", "fc2")


def final_norm(lm: Any) -> nn.Module | None:
    """The norm behind a text model's last layer, or None where it is not known."""
    found = (getattr(lm, name, None) for name in _FINAL_NORMS)
    return next((part for part in found if isinstance(part, nn.Module)), None)


def last_map(block: Any) -> nn.Module | str:
    """The last projection of a layer's MLP, whose input is what its neurons give; or why there is no such thing."""
    found = branches(block)
    if found is None:
        return "its layers are not known to be a mixer and an MLP"
    mlp = found[1]
    names = {name for part in (block, mlp) for name, _ in part.named_children()}
    if any("expert" in name for name in names):
        return "a mixture of experts: each token has neurons of its own, which cannot be compared"
    maps = (getattr(mlp, name, None) for name in _LAST_MAPS)
    return next((part for part in maps if isinstance(part, nn.Module)), "an MLP of unknown form")
