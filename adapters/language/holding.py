"""What traces tell of key-value caches: in which share of a layer's heads the entry of a column is still held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core.eviction import Piece
from ...core.row_data import Snapshot


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


def shares_held(
    places: Sequence[tuple[int, Snapshot]], lengths: Sequence[int | None], held: Mapping[int, Tensor]
) -> Tensor:
    """In which share of the heads each column of a prompt is held, layer by layer.

    Args:
        places: (first layer, where its columns stood) of each run of layers that saw the same rows, with owners.
        lengths: entries of each layer's cache behind the forward, before any left; None where it keeps none of its
            own.
        held: bool `[B, 1 or Hkv, n]`, from `held_with`, of layers from whose cache entries leave; others hold what
            reached them.

    Returns:
        fp32 `[layers, B, S]`; NaN in layers that keep no entries.
    """
    found = []
    for layer, length in enumerate(lengths):
        shot = [shot for first, shot in places if first <= layer][-1]
        owner = shot.owner
        assert owner is not None  # traces are kept
        if length is None:
            found.append(torch.full_like(owner, torch.nan, dtype=torch.float32))
            continue
        # Columns of this call stand at the end; of a window those in front are gone.
        at = torch.where(owner < 0, -1, owner + length - shot.length)
        share = torch.ones_like(at, dtype=torch.float32)
        if layer in held:
            share = held[layer].float().mean(1).gather(1, at.clamp(min=0))
        found.append(torch.where(at < 0, 0.0, share))
    return torch.stack(found)
