"""Methods asked without data for what a key-value cache keeps, and what the attention that they read took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import kernels
from ..core.attachment import Entry
from ..core.ledger import Event, Group
from ..core.method import Method
from ..core.model_shape import BlockShape
from ..core.signals import ENTRIES, Need
from ..core.view import Signal, TokenView
from .flops import decoder_profiles
from .meta import empty

if TYPE_CHECKING:
    from .rehearsal import Rehearsal


def ask_caches(again: Rehearsal) -> None:
    """Sums attention as layers did, then asks every method of a call for each of its view rows, layer by layer."""
    language = again.shape.language
    assert language is not None
    for mass in again.run.masses:
        _sum(again, language.blocks[mass.layer], mass.rows, mass.queries, mass.keys)
    _follow(again, language.blocks)
    events = [event for event in again.run.events if event.stage == "cache" and event.groups]
    for index, written in dict.fromkeys((event.method, event.written) for event in events):
        own = [event for event in events if (event.method, event.written) == (index, written)]
        for number in range(max(len(event.groups) for event in own)):
            _ask(again, [event for event in own if number < len(event.groups)], number, language.blocks)


def _sum(again: Rehearsal, block: BlockShape, rows: int, queries: int, keys: int) -> None:
    """Attention of some rows, of which columns are summed: a second product of queries and keys."""
    q = empty(rows, block.heads, queries, block.head_width)
    k = empty(rows, block.kv_heads, keys, block.head_width)
    again.spent(lambda: kernels.attention_rows(q, k, scale=1.0))


def _follow(again: Rehearsal, blocks: Sequence[BlockShape]) -> None:
    """Sums that go on in decode steps, of methods that are asked again while an answer is written."""
    summed = {mass.layer for mass in again.run.masses}
    tracked = {layer for layer, entry in again.attachment.of_caches.items() if entry.site.every} & summed
    if not tracked or not again.run.decodings:
        return
    profile = decoder_profiles(again.run, blocks)[1]
    for layer in sorted(tracked):
        for part in again.run.decodings:
            # Steps see one key more each time: what all of them see is the same product.
            for stretch in profile.stretches(layer, part.first, part.steps):
                _sum(again, blocks[layer], part.rows, 1, blocks[layer].seen(*stretch))


def _ask(again: Rehearsal, events: Sequence[Event], number: int, blocks: Sequence[BlockShape]) -> None:
    """One group of view rows of a method, in all layers."""
    entries = [again.entry(event) for event in events]
    method = entries[0].method
    shown = [_view(again, entry, e.groups[number], blocks[e.layer or 0]) for entry, e in zip(entries, events)]
    if type(method).plan is not Method.plan:  # else every layer decides for itself
        notes: dict[str, Any] = {}
        for view in shown:
            view.row = notes
        again.tried(entries[0], shown[0], lambda: method.plan(shown))
    for entry, view in zip(entries, shown):
        again.tried(entry, view, partial(method.reduce, view))


def _view(again: Rehearsal, entry: Entry, group: Group, block: BlockShape) -> TokenView:
    """View rows of a layer's cache without data: a row for each head, or heads side by side."""
    heads, d = block.kv_heads, block.head_width
    apart = entry.scope == "head"
    rows = group.rows * heads if apart else group.rows
    leading = (rows,) if apart else (rows, heads)

    def give(need: Need) -> Signal:
        if need.stage is not None:
            return again.brought(need, replace(group, rows=rows))
        return empty(*leading, group.n, *((d,) if need.name in ENTRIES else ()))

    view = again.view(entry, replace(group, rows=rows), d if apart else heads * d, give)
    view.row, view.state = {}, {}  # nothing is noted from layer to layer
    return view
