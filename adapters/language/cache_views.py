"""What methods see of key-value caches, and what they answer: views of a layer's entries, budgets over layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.attachment import Attachment, Entry
from ...core.eviction import Piece
from ...core.ledger import Event
from ...core.ledger import Group as Booked
from ...core.method import Method
from ...core.reduction import Reduction
from ...core.row_data import Group
from ...core.rows import PromptRows
from ...core.signals import MASSES, Need
from ...core.view import Signal, TokenView
from ...kernels.exact import exact
from .call import Brought
from .sites import carried_signal

Answer = tuple[list[Piece], Event]
"""What leaves of a layer's cache, and the visit for the books, whose lengths are still those in front of it."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The cache of one layer as its method sees it.

    Attributes:
        entry: the method at its site.
        rows: the rows of the call as the layer had them, without what left since.
        brought: what was noted while the layer ran.
        keys: `[B, Hkv, past + L, d]`.
        values: the same.
        past: columns that the cache held before the call.
    """

    entry: Entry
    rows: PromptRows
    brought: Brought
    keys: Tensor
    values: Tensor
    past: int

    def entries(self, table: Tensor, group: Group) -> Tensor:
        """Keys or values of a group, `[G, Hkv, N, d]`."""
        head = torch.arange(table.shape[1], device=table.device)[None, :, None]
        return table[group.index[:, None, None], head, self.past + group.columns[:, None]]


class CacheViews:
    """Asks methods what stays in caches.

    Args:
        attachment: whose methods.
        depth: decoder layers.
    """

    def __init__(self, attachment: Attachment, depth: int) -> None:
        self.attachment = attachment
        self.depth = depth

    def ask(self, seen: Mapping[int, Seen]) -> dict[int, Answer]:
        """What methods answer.

        Args:
            seen: by layer.

        Returns:
            By layer, what leaves; nothing where all of a view stays.
        """
        pieces: dict[int, list[Piece]] = {layer: [] for layer in seen}
        booked: dict[int, list[Booked]] = {layer: [] for layer in seen}
        for views in self._together(seen):
            notes: dict[str, Any] = {}
            method = seen[next(iter(views))].entry.method
            if _plans(method):
                shown = [self._view(seen[layer], group, notes, data=False) for layer, group in views.items()]
                with exact(seen[next(iter(views))].keys.device):
                    method.plan(shown)
            for layer, group in views.items():
                reduction = self.attachment.decide(seen[layer].entry, self._view(seen[layer], group, notes))
                if reduction is not None and _whole(reduction, group.n):
                    reduction = None
                slots = group.n if reduction is None else reduction.slots
                of = (group.entered, group.text, group.length, group.mixed, group.frames, group.cells)
                booked[layer].append(Booked(len(group.units), group.n, slots, *of))
                if reduction is not None:
                    pieces[layer].append(self._piece(seen[layer], group, reduction))
        return {layer: (pieces[layer], self._event(seen[layer], pieces[layer], booked[layer])) for layer in seen}

    @staticmethod
    def _event(seen: Seen, pieces: list[Piece], booked: list[Booked]) -> Event:
        site, length = seen.entry.site, seen.keys.shape[2]
        ragged = any(piece.reduction.valid is not None for piece in pieces)
        kind = "cut" if pieces else "observe"
        return Event("cache", site.layer, "end", seen.entry.index, kind, length, length, tuple(booked), ragged)

    @staticmethod
    def _piece(seen: Seen, group: Group, reduction: Reduction) -> Piece:
        method = seen.entry.method
        size = None if seen.rows.size is None else seen.rows.gather(seen.rows.size, group)
        if size is not None and seen.entry.scope == "head":
            size = size.repeat_interleave(seen.keys.shape[1], 0)
        columns = seen.past + group.columns
        return Piece(group.index, columns, reduction, size, method.merge_keys == "weighted", method.proportional)

    def _together(self, seen: Mapping[int, Seen]) -> Iterator[dict[int, Group]]:
        """View rows to be shown together, by layer.

        Where each layer decides for itself that is a group of one layer, and else rows that stand in one group in
        every layer.
        """
        methods: dict[int, list[int]] = {}
        for layer in sorted(seen):
            methods.setdefault(seen[layer].entry.index, []).append(layer)
        for layers in methods.values():
            groups = {layer: self._groups(seen[layer]) for layer in layers}
            if not _plans(seen[layers[0]].entry.method):
                yield from ({layer: group} for layer in layers for group in groups[layer])
                continue
            places: dict[tuple[int, int, int], dict[int, tuple[int, int]]] = {}
            for layer in layers:
                for number, group in enumerate(groups[layer]):
                    for row, unit in enumerate(group.units):
                        places.setdefault(unit, {})[layer] = (number, row)
            alike: dict[tuple[tuple[int, int], ...], list[dict[int, tuple[int, int]]]] = {}
            for place in places.values():
                alike.setdefault(tuple((layer, at[0]) for layer, at in place.items()), []).append(place)
            for key, members in alike.items():
                yield {layer: groups[layer][number].only([m[layer][1] for m in members]) for layer, number in key}

    @staticmethod
    def _groups(seen: Seen) -> list[Group]:
        scope = seen.entry.scope
        # The number of rows that saw an entry depends on its row's length.
        by_length = any(need.name == "attention_rows" for need in seen.entry.needs)
        return seen.rows.groups("picture" if scope == "head" else scope, by_length=by_length)

    def _view(self, seen: Seen, group: Group, notes: dict[str, Any], data: bool = True) -> TokenView:
        """A view of some entries.

        Args:
            seen: the cache.
            group: the view rows.
            notes: `TokenView.row`.
            data: whether tokens are shown, or their shape alone.
        """
        entry, rows, values = seen.entry, seen.rows, seen.values
        apart, heads = entry.scope == "head", values.shape[1]

        def each(table: Tensor) -> Tensor:
            return table.repeat_interleave(heads, 0) if apart else table

        times = heads if apart else 1
        if data:
            held = seen.entries(values, group).detach()
            tokens = held.flatten(0, 1) if apart else held.transpose(1, 2).flatten(2)
        else:
            shape = (len(group.units) * times, group.n, values.shape[3] * (heads // times))
            tokens = torch.empty(shape, dtype=values.dtype, device="meta")
        signals: dict[str, Signal] = {need.key: self._signal(need, seen, group) for need in entry.needs}
        view = TokenView(
            tokens,
            entry.asked,
            size=None if rows.size is None else each(rows.gather(rows.size, group)),
            depth=self.depth,
            grid=group.grid,
            part=None if rows.part is None else each(rows.gather(rows.part, group)),
            picture=rows.gather(rows.label, group) if entry.scope == "sample" else None,
            entered=group.entered,
            columns=each(rows.relative(group, group.columns)),
            signals=signals,
            row=notes,
            memory=self.attachment.remember(entry.index),
            frames=group.frames,
            cells=group.cells,
        )
        self.attachment.bind_user(view, signals)
        return view

    def _signal(self, need: Need, seen: Seen, group: Group) -> Signal:
        """What a view gets under a need; heads are view rows in scope ``head``."""
        rows, heads = seen.rows, seen.keys.shape[1]
        apart = seen.entry.scope == "head"

        def by_head(made: Tensor) -> Tensor:
            """`[G, Hkv, N, ...]` as the scope has it."""
            return made.flatten(0, 1) if apart else made

        if need.stage is not None:
            carried = carried_signal(need, rows, group)
            if carried is None or not apart:
                return carried
            return lambda: _made(carried).repeat_interleave(heads, 0)
        if need.name in MASSES:
            window = seen.entry.site.window if need.name == "recent_mass" else 0
            table = seen.brought.masses[need.name, window]
            return lambda: by_head(rows.gather(table, group).transpose(1, 2))
        if need.name == "attention_rows":
            left = group.length - rows.drafts - rows.relative(group, group.columns)
            return lambda: by_head(left.float()[:, None].expand(-1, heads, -1))
        held = {"keys_cached": seen.keys, "values_cached": seen.values}.get(need.name)
        return None if held is None else lambda: by_head(seen.entries(held, group).detach())


def _made(signal: Signal) -> Tensor:
    made = signal() if callable(signal) else signal
    assert made is not None  # what is carried exists
    return made


def _plans(method: Method) -> bool:
    return type(method).plan is not Method.plan


def _whole(reduction: Reduction, n: int) -> bool:
    """Whether everything stays as it is."""
    merging = reduction.merges or reduction.keep_weight is not None
    return reduction.slots == n and not merging and reduction.valid is None
