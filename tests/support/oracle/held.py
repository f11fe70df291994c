"""What later rows find of a prompt in the cache of one layer, after entries left it or merged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .cuts import Cut


class Entries(NamedTuple):
    """Keys and values of a row as later rows see them.

    Attributes:
        keys, values: `[Hkv, L, d]`.
        gone: bool `[Hkv, L]`.
        bias: `[Hkv, L]`, what is added to logits.
    """

    keys: Tensor
    values: Tensor
    gone: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Unit:
    """One view row (or all key-value heads of one).

    Attributes:
        places: int64 `[N]`, columns of its entries in the whole row, or `[Hkv, N]` where each head has its own.
        cuts: one for all heads, or one a head.
        weighted: whether keys mix as values do.
        sizes: `[N]`, where slots get log(size).
    """

    places: Tensor
    cuts: list[Cut]
    weighted: bool = False
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Eviction:
    """What one prompt's end did to the entries of a layer.

    Attributes:
        until: prompt columns in front of the first row that finds it so.
        units: what left and merged.
        lost: int64, prompt columns whose entries left besides.
    """

    until: int
    units: list[Unit] = field(default_factory=list)
    lost: Tensor | None = None

    def apply(self, held: Entries, places: Tensor) -> Entries:
        """Entries behind it.

        Args:
            held: before.
            places: int64 `[L]`, prompt column of each.
        """
        keys, values, gone, bias = (table.clone() for table in held)
        for unit in self.units:
            for head in range(len(keys)):
                columns = _where(places, unit.places if unit.places.dim() == 1 else unit.places[head])
                cut = unit.cuts[head if len(unit.cuts) > 1 else 0]
                kept = columns[cut.keep]
                values[head, kept] = cut.mix.double() @ held.values[head, columns].double()
                if unit.weighted:
                    keys[head, kept] = cut.mix.double() @ held.keys[head, columns].double()
                gone[head, columns] = True
                gone[head, kept] = False
                if unit.sizes is not None:
                    bias[head, kept] = (cut.own.double() @ unit.sizes.double()).log()
        if self.lost is not None:
            gone[:, _where(places, self.lost)] = True
        return Entries(keys, values, gone, bias)

    def without(self, lost: Tensor) -> Eviction:
        """And entries of these prompt columns left besides."""
        return replace(self, lost=lost)


def _where(places: Tensor, wanted: Tensor) -> Tensor:
    """Index of prompt columns among those that a layer holds."""
    found = (places[None] == wanted[:, None]).int()
    assert bool((found.sum(1) == 1).all()), "an entry that this layer does not hold"
    return found.argmax(1)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, blocked: Tensor, scale: float, places: Tensor, evictions: list[Eviction]
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in which each row sees entries as they were when it came.

    Args:
        q: `[H, L, d]`.
        keys, values: `[Hkv, L, d]`.
        blocked: bool `[L, L]`.
        scale: of logits.
        places: int64 `[L]`.
        evictions: in order.

    Returns:
        What is read, `[H, L, d]`, logits `[H, L, L]`, and what is gone in the end, bool `[Hkv, L]`.
    """
    many = q.shape[0] // keys.shape[0]
    held = Entries(keys, values, torch.zeros(keys.shape[:2]) > 0, torch.zeros(keys.shape[:2]).double())

    def read(now: Entries) -> tuple[Tensor, Tensor]:
        k, v, gone, bias = (table.repeat_interleave(many, 0) for table in now)
        logits = q @ k.transpose(1, 2) * scale + bias[:, None]
        logits = logits.masked_fill(blocked[None] | gone[:, None], float("-inf"))
        return logits.softmax(-1) @ v, logits

    mixed, logits = read(held)
    for eviction in evictions:
        held = eviction.apply(held, places)
        later = (places >= eviction.until)[None, :, None]
        if bool(later.any()):
            other, seen = read(held)
            mixed, logits = torch.where(later, other, mixed), torch.where(later, seen, logits)
    return mixed, logits, held.gone
