"""Layers of a host's key-value cache: which give entries up, and one that carries what is known of each."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError
from .hosts import version_of


def put_entries(cache: Any, layer: int, keys: Tensor, values: Tensor) -> None:
    """Puts others in the place of what `host_objects.entries_in` gave."""
    held = cache.layers[layer]
    held.keys, held.values = keys, values


def why_entries_stay(cache: Any, layers: Iterable[int]) -> str | None:
    """Why entries cannot leave some layers of a cache by taking them out of its tensors, or None where they can.

    Args:
        cache: of a call.
        layers: whose entries are to leave.
    """
    kind, name = _growing(), type(cache).__name__
    if kind is None:
        return f"transformers {version_of('transformers')} has no DynamicLayer, the layer of a cache that grows freely"
    held = getattr(cache, "layers", None)
    if not isinstance(held, list):
        return f"{name} is not made of layers"
    if getattr(cache, "offloading", False):
        return f"{name} moves its layers to the CPU while others run (offloading)"
    future = getattr(cache, "layer_class_to_replicate", None)
    for layer in layers:
        found = type(held[layer]) if layer < len(held) else future
        if found is not None and found not in (kind, _tracked(kind)):
            return f"layer {layer} of {name} is a {found.__name__}, which holds entries in another form"
    return None


def _growing() -> type | None:
    """transformers' layer of a cache that grows freely."""
    from transformers import cache_utils

    found = getattr(cache_utils, "DynamicLayer", None)
    return found if isinstance(found, type) else None


def track(cache: Any, layer: int, tables: dict[str, Tensor]) -> None:
    """Makes a layer of a cache carry what is known of its entries; it follows beams.

    Args:
        cache: of which `why_entries_stay` says nothing of that layer.
        layer: its number.
        tables: `[B m, n, ...]`, rows of one of the batch side by side.
    """
    held, kind = cache.layers[layer], _growing()
    assert kind is not None
    made: Any = object.__new__(_tracked(kind))
    made.__dict__.update(held.__dict__, tables=tables)
    cache.layers[layer] = made


def tables_in(cache: Any, layer: int) -> dict[str, Tensor]:
    """What a layer carries by `track`.

    Raises:
        CacheError: nothing; the layer was put back by somebody else.
    """
    found = getattr(cache.layers[layer], "tables", None)
    if not found:
        raise CacheError(
            f"layer {layer} of this cache no longer carries what is known of its entries, by which they leave while an "
            "answer is written; start with a fresh cache"
        )
    tables: dict[str, Tensor] = found
    return tables


@functools.cache
def _tracked(kind: type) -> type:
    """A layer that carries tables; made when it is asked for, since its base is the host's."""

    class TrackedLayer(kind):
        """A layer of a cache that carries what is known of its entries, and permutes it with them."""

        tables: dict[str, Tensor]

        def _pick(self, rows: Tensor) -> None:
            batch = self.keys.shape[0]
            at = {name: rows.to(table.device) for name, table in self.tables.items()}
            self.tables = {
                name: table.unflatten(0, (batch, -1))[at[name]].flatten(0, 1) for name, table in self.tables.items()
            }

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Beams are chosen."""
            self._pick(beam_idx)
            super().reorder_cache(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            """Rows are repeated."""
            self._pick(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))
            super().batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            """Rows are chosen."""
            self._pick(torch.arange(self.keys.shape[0])[indices.cpu()])
            super().batch_select_indices(indices)

        def crop(self, *given: Any, **named: Any) -> None:
            """Drafts are taken back.

            Raises:
                CacheError: always.
            """
            raise CacheError(
                "a method drops entries while the answer is written (every=), and such a cache takes no drafts of "
                "assisted decoding back; use no assistant and no prompt lookup, or every=0"
            )

        def reset(self) -> None:
            """The cache is emptied."""
            self.tables = {}
            super().reset()

    return TrackedLayer
