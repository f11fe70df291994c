"""What methods see of key-value caches, and what they answer: views of a layer's entries, budgets over layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...core.attachment import Attachment, Entry
from ...core.eviction import Piece, heads_as_rows
from ...core.ledger import Event
from ...core.ledger import Group as Booked
from ...core.method import Method
from ...core.pictures import Picture
from ...core.reduction import Reduction
from ...core.row_data import Group
from ...core.rows import PromptRows
from ...core.signals import Need
from ...core.view import Signal, TokenView
from ...kernels.exact import exact
from .row_views import carried_signal, view_of

Answer = tuple[list[Piece], Event]
"""What leaves of a layer's cache, and the visit for the books, whose lengths are still those in front of it."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The cache of one layer as its method sees it; in scope ``head`` every head is a row of it.

    Attributes:
        entry: the method at its site.
        rows: the columns of the call as the layer had them, or all that the cache holds; without what left since.
        masses: by signal, fp32 `[B, L, H, ...]`, attention that each of these columns received.
        keys: `[B, H, past + L, d]`.
        values: the same.
        heads: rows that are heads of one.
    """

    entry: Entry
    rows: PromptRows
    masses: dict[str, Tensor]
    keys: Tensor
    values: Tensor
    heads: int = 1

    @classmethod
    def of(cls, entry: Entry, rows: PromptRows, masses: dict[str, Tensor], keys: Tensor, values: Tensor) -> Seen:
        """A layer's cache, whose heads become rows where the method asks for that."""
        if entry.scope != "head":
            return cls(entry, rows, masses, keys, values)
        heads = keys.shape[1]
        apart = {name: masses_by_head(table) for name, table in masses.items()}
        return cls(entry, _by_head(rows, heads), apart, heads_as_rows(keys), heads_as_rows(values), heads)

    @property
    def past(self) -> int:
        """Columns that the cache held before those of `rows`."""
        return self.keys.shape[2] - self.rows.length

    def entries(self, table: Tensor, group: Group) -> Tensor:
        """Keys or values of a group, `[G, H, N, d]`."""
        head = torch.arange(table.shape[1], device=table.device)[None, :, None]
        return table[group.index[:, None, None], head, self.past + group.columns[:, None]]


def masses_by_head(table: Tensor) -> Tensor:
    """Every head as a row: `[B, L, H, ...]` as `[B H, L, 1, ...]`."""
    return heads_as_rows(table.transpose(1, 2)).transpose(1, 2)


def pictures_by_head(pictures: Sequence[Picture], heads: int) -> list[Picture]:
    """The same pictures in every head of their row."""
    return [replace(picture, row=picture.row * heads + head) for picture in pictures for head in range(heads)]


def _by_head(rows: PromptRows, heads: int) -> PromptRows:
    """The same rows for every head, side by side."""

    def each(table: Tensor | None) -> Any:
        return None if table is None else table.repeat_interleave(heads, 0)

    return PromptRows(
        rows.batch * heads,
        rows.length,
        [length for length in rows.lengths for _ in range(heads)],
        pictures_by_head(rows.pictures, heads),
        each(rows.label),
        each(rows.part),
        each(rows.valid),
        each(rows.place),
        rows.positions,
        each(rows.size),
        carried={name: (each(table), axis) for name, (table, axis) in rows.carried.items()},
        drafts=rows.drafts,
    )


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
                booked[layer].append(Booked(len(group.units) // seen[layer].heads, group.n, slots, *of))
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
        if data:
            tokens = seen.entries(values, group).detach().transpose(1, 2).flatten(2)
        else:
            shape = (len(group.units), group.n, values.shape[1] * values.shape[3])
            tokens = torch.empty(shape, dtype=values.dtype, device="meta")
        signals: dict[str, Signal] = {need.key: _signal(need, seen, group) for need in entry.needs}
        return view_of(self.attachment, entry, rows, group, tokens, signals, depth=self.depth, row=notes)


def _signal(need: Need, seen: Seen, group: Group) -> Signal:
    """What a view gets under a need; where heads are rows there is no axis of heads."""
    rows = seen.rows

    def shown(made: Tensor) -> Tensor:
        """Of `[G, H, N, ...]`."""
        return made.squeeze(1) if seen.entry.scope == "head" else made

    if need.stage is not None:
        return carried_signal(need, rows, group)
    if need.name in seen.masses:
        table = seen.masses[need.name]
        return lambda: shown(rows.gather(table, group).transpose(1, 2).expand(-1, seen.keys.shape[1], -1))
    if need.name == "attention_rows":
        left = group.length - rows.drafts - rows.relative(group, group.columns)
        return lambda: shown(left.float()[:, None].expand(-1, seen.keys.shape[1], -1))
    held = {"keys_cached": seen.keys, "values_cached": seen.values}.get(need.name)
    return None if held is None else lambda: shown(seen.entries(held, group).detach())


def _plans(method: Method) -> bool:
    return type(method).plan is not Method.plan


def _whole(reduction: Reduction, n: int) -> bool:
    """Whether everything stays as it is."""
    merging = reduction.merges or reduction.keep_weight is not None
    return reduction.slots == n and not merging and reduction.valid is None
