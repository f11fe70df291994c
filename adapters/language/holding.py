"""What traces tell of key-value caches: in which share of a layer's heads the entry of a column is still held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.eviction import Piece
from .. import host_objects
from .call import Call
from .masks import RECURRENT


def held_with(stay: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Entries that a layer holds on, alone or in another one that they joined.

    Args:
        stay: bool `[B, n]`, from `eviction.staying`; rows may be heads.
        pieces: what methods answered, by which it was made.

    Returns:
        bool `[B, n]`.
    """
    for piece in pieces:
        owner = piece.reduction.assignment(piece.columns.shape[1])
        stay = stay.index_put((piece.index[:, None], piece.columns), owner >= 0)
    return stay


def shares_held(call: Call, lm: Any, kinds: Sequence[str], sources: Mapping[int, int]) -> Tensor | None:
    """In which share of the heads each column of a prompt is held behind its prefill, layer by layer.

    Args:
        call: a prefill with pictures, of which traces are kept.
        lm: the text model.
        kinds: type of each layer.
        sources: layers that keep no keys of their own.

    Returns:
        fp32 `[layers, B, S]`, NaN in layers that keep no entries; None where there is no cache.
    """
    if call.cache is None:
        return None
    found = []
    for layer, kind in enumerate(kinds):
        shot = [shot for first, shot in call.places if first <= layer][-1]
        owner, left = shot.owner, call.held.get(layer)
        assert owner is not None  # traces are kept
        if kind in RECURRENT or layer in sources:
            found.append(torch.full_like(owner, torch.nan, dtype=torch.float32))
            continue
        length = host_objects.keys_in(lm.layers[layer], call.cache, layer).shape[2] if left is None else left.shape[2]
        # Columns of this call stand at the end; of a window those in front are gone.
        at = torch.where(owner < 0, -1, owner + length - shot.length)
        share = torch.ones_like(at, dtype=torch.float32)
        if left is not None:
            share = left.float().mean(1).gather(1, at.clamp(min=0))
        found.append(torch.where(at < 0, 0.0, share))
    return torch.stack(found)
