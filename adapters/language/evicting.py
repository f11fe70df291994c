"""Entries leave the key-value cache behind a prefill, and behind decode steps where a method asks for that.

All methods decide, then all layers change, so that an error leaves the cache as it was. Text stays; so do entries of
pictures of earlier calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.attachment import Attachment
from ...core.eviction import Entries, Piece, evicted, staying
from ...core.ledger import Event
from ...core.pictures import PAD
from ...core.rows import PromptRows
from ...core.stream import Segment, Stream
from ...core.threads import PerThread
from ...errors import CacheError, VlmtokWarning
from .. import cache_layers, host_objects
from .cache_tracking import VALID, grown, seen_now, tables_of
from .cache_views import CacheViews, Seen, masses_by_head
from .cache_watch import CacheWatch
from .call import Call, DecoderRun
from .holding import held_with
from .segments import Segments


@dataclass(frozen=True, eq=False)
class Leaving:
    """What leaves of a layer's cache.

    Attributes:
        pieces: what its method left of its views.
        event: of that visit, or None where no method acts.
        lost: bool `[B, L]`, columns of the rows of this call that leave with tokens of later layers, or None.
        by: the method that cut them there last.
        gone: how many these are, of all rows together.
        heads: rows of `pieces` that are heads of one.
        tables: what is to be known of each entry from now on.
    """

    pieces: list[Piece]
    event: Event | None = None
    lost: Tensor | None = None
    by: int = -1
    gone: int = 0
    heads: int = 1
    tables: dict[str, Tensor] | None = None

    @property
    def changes(self) -> bool:
        """Whether anything leaves."""
        return bool(self.pieces) or self.lost is not None


class Evictor:
    """Lets methods act on the caches of a language model's layers.

    Args:
        attachment: whose methods.
        lm: gives the text model; a weak reference.
        segments: of the layers.
        running: what each thread runs.

    Attributes:
        entries: methods by the layer of whose cache they choose.
        follows: whether entries of tokens that leave between layers leave the caches before, too.
        tracked: layers of which entries leave while the answer is written.
        watch: notes what layers do to entries.
    """

    def __init__(
        self, attachment: Attachment, lm: Callable[[], Any], segments: Segments, running: PerThread[DecoderRun]
    ) -> None:
        self.attachment = attachment
        self.lm = lm
        self.segments = segments
        self.entries = attachment.of_caches
        self.follows = attachment.forgets
        self.tracked = [layer for layer, entry in self.entries.items() if entry.site.every]
        self.watch = CacheWatch(attachment, lm, segments, running, self.entries)
        self.views = CacheViews(attachment, len(segments.kinds))
        self.warned = False

    @property
    def weighs(self) -> str:
        """A method whose merged entries weigh more in later attention; empty where there is none."""
        return next((str(entry.method) for entry in self.entries.values() if entry.method.proportional), "")

    @property
    def acts(self) -> bool:
        """Whether anything can leave a cache."""
        return bool(self.entries) or self.follows

    @property
    def names(self) -> tuple[str, ...]:
        """Methods that act on caches, each once."""
        forgetting = [entry for entry in self.attachment.at("decoder") if entry.site.forget]
        return tuple(dict.fromkeys(entry.method.spec_name() for entry in [*forgetting, *self.attachment.at("cache")]))

    def check(self, cache: Any) -> None:
        """Before a prefill with pictures.

        Args:
            cache: of the call, or None where there is none yet.

        Raises:
            CacheError: its entries cannot be taken out.
        """
        if cache is None or not self.acts:
            return
        layers = range(len(self.segments.kinds)) if self.follows else self.entries
        why = cache_layers.why_entries_stay(cache, [layer for layer in layers if layer not in self._blind])
        if why is not None:
            raise CacheError(
                f"entries cannot leave this cache: {why}; use the default cache (leave cache_implementation out)"
            )

    def follow(self, call: Call, drafts: int, pictures: bool) -> None:
        """Before a call: what travels with tracked caches becomes part of the past.

        Args:
            call: it.
            drafts: last columns that hold drafts of speculative decoding.
            pictures: whether the call brings some.

        Raises:
            CacheError: tracked caches take no drafts, and no second prompt with pictures.
        """
        if not self.tracked:
            return
        if drafts:
            raise CacheError(
                "a method drops entries while the answer is written (every=), and assisted decoding takes drafts back "
                "from a cache; use no assistant and no prompt lookup, or every=0"
            )
        stream = call.stream
        if stream is None or not stream.pictures:
            return
        if pictures:
            raise CacheError(
                "entries leave this cache while the answer is written (every=), and a second prompt with pictures came "
                "on it; start with a fresh cache, or use every=0"
            )
        call.tracked = True
        for layer in self.tracked:
            valid = cache_layers.tables_in(call.cache, layer).get(VALID)
            stream.segments[layer].valid = valid

    # ------------------------------------------------------------------ behind the forward
    def decide(self, call: Call) -> dict[int, Leaving]:
        """What leaves of each layer's cache; nothing is changed yet.

        Args:
            call: that ran.

        Returns:
            By layer; those of which nothing leaves are left out.

        Raises:
            CacheError: entries cannot be taken out of the cache.
        """
        if not self.acts or (call.rows is None and not call.tracked):
            return {}
        if call.cache is None:
            self._say_uncached()
            return {}
        self.check(call.cache)
        found = self._written(call) if call.rows is None else self._brought(call)
        leaving = {layer: part for layer, part in found.items() if part.changes or part.tables is not None}
        if any(part.changes for part in leaving.values()):
            call.check_cut()
        return leaving

    def _say_uncached(self) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                "a model with methods for its key-value cache ran without one (use_cache=False): no entry left, and "
                "answers differ from those with a cache",
                VlmtokWarning,
                stacklevel=2,
            )

    def _brought(self, call: Call) -> dict[int, Leaving]:
        """Behind a prefill with pictures."""
        found = lost_below(call, [i for i in range(len(self.segments.kinds)) if i not in self._blind])
        seen: dict[int, Seen] = {}
        for layer, entry in self.entries.items():
            brought = call.brought.pop(layer, None)
            if brought is not None:
                rows = _without(brought.rows, found[layer].lost if layer in found else None)
                seen[layer] = Seen.of(entry, rows, brought.masses, *self._entries(call, layer))
        self._answered(call, seen, found)
        for layer in self.tracked:
            if layer in seen:
                found[layer] = replace(found[layer], tables=tables_of(seen[layer]))
        return found

    def _written(self, call: Call) -> dict[int, Leaving]:
        """Behind a call that added text to tracked caches."""
        stream = call.stream
        assert stream is not None
        tables, seen = {}, {}
        before, after = stream.written, stream.written + call.columns
        for layer in self.tracked:
            entry = self.entries[layer]
            keys, values = self._entries(call, layer)
            attended = call.attended.pop(layer, None)
            if attended is not None and entry.scope == "head":
                attended = masses_by_head(attended)
            tables[layer] = grown(cache_layers.tables_in(call.cache, layer), attended, call.columns)
            if before // entry.site.every != after // entry.site.every:
                valid = self._valid(call, stream, layer, len(keys), keys.device)
                seen[layer] = seen_now(entry, tables[layer], valid, stream.pictures, keys, values)
        found: dict[int, Leaving] = {}
        self._answered(call, seen, found)
        for layer in self.tracked:
            heads = self._entries(call, layer)[0].shape[1] if self.entries[layer].scope == "head" else 1
            found[layer] = replace(found.get(layer, Leaving([], heads=heads)), tables=tables[layer])
        return found

    def _answered(self, call: Call, seen: dict[int, Seen], found: dict[int, Leaving]) -> None:
        """Adds what methods leave of views, and books visits that leave everything."""
        for layer, (pieces, event) in self.views.ask(seen).items():
            part = found.get(layer, Leaving([]))
            found[layer] = replace(part, pieces=pieces, event=event, heads=seen[layer].heads)
            if not found[layer].changes:
                self.attachment.ledger.visit(call.run, event)

    @property
    def _blind(self) -> Mapping[int, str]:
        return self.attachment.layout.stages["cache"].blind

    def _entries(self, call: Call, layer: int) -> tuple[Tensor, Tensor]:
        return host_objects.entries_in(self.lm().layers[layer], call.cache, layer)

    @staticmethod
    def _valid(call: Call, stream: Stream, layer: int, batch: int, device: torch.device) -> Tensor | None:
        """Which entries are real, those of this call included."""
        segment = stream.segment(layer)
        count, new, _ = call.added.get(segment.first, call.added[0])
        return segment.extended(count, new, batch, device)

    def apply(self, call: Call, stream: Stream, leaving: Mapping[int, Leaving]) -> None:
        """Takes entries out.

        Args:
            call: that ran, whose columns are past now.
            stream: its past, which is brought up to date.
            leaving: from `decide`.

        Raises:
            CacheError: nothing would be left of a row in some layer.
        """
        held = {layer: self._held(call, stream, layer, leaving[layer]) for layer in sorted(leaving)}
        stay = {
            layer: staying(held[layer], leaving[layer].pieces, self._lost(leaving[layer], held[layer]))
            for layer in held
        }
        left, before = self._counts(leaving, stay)
        if call.rows is None:
            stream.written += call.columns
        elif self.tracked:
            stream.pictures = [replace(picture) for picture in call.rows.pictures]
        for layer, part in ((layer, leaving[layer]) for layer in held):
            segment, length = _own(stream, layer, len(self.segments.kinds)), held[layer].keys.shape[2]
            now = held[layer]
            if part.changes:
                length = max(left[layer])
                now = evicted(held[layer], part.pieces, stay[layer][0], length)
                if self.attachment.trace and call.rows is not None:
                    call.held[layer] = held_with(stay[layer][0], part.pieces).unflatten(0, (-1, part.heads))
                now = now.joined(part.heads) if part.heads > 1 else now
                cache_layers.put_entries(call.cache, layer, now.keys, now.values)
                gone = sum(before[layer]) - sum(left[layer])
                self._book(call, part, layer, segment.length, length, gone // part.heads)
                segment.length, segment.bias, segment.blocks = length, now.bias, now.blocks
                segment.valid = now.valid if min(left[layer]) < length else None
            if part.tables is not None:
                valid = {} if segment.valid is None else {VALID: segment.valid}
                cache_layers.track(call.cache, layer, {**now.tables, **valid})

    @staticmethod
    def _counts(
        leaving: Mapping[int, Leaving], stay: Mapping[int, tuple[Tensor, Tensor]]
    ) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Entries of each row behind and in front of what methods leave, by layer; a device is asked once."""
        changed = [layer for layer in stay if leaving[layer].changes]
        sums = [torch.cat([mask.sum(1) for mask in stay[layer]]) for layer in changed]
        table = torch.cat([one.to(sums[0].device) for one in sums]).tolist() if sums else []
        left, before = {}, {}
        for layer in changed:
            rows = len(stay[layer][0])
            left[layer], before[layer], table = table[:rows], table[rows : 2 * rows], table[2 * rows :]
            if min(left[layer]) == 0:
                raise CacheError(
                    f"nothing would stay in the cache of layer {layer}, by which hosts tell a filled cache; keep an "
                    "entry, or give the prompt some text"
                )
        return left, before

    def _held(self, call: Call, stream: Stream, layer: int, part: Leaving) -> Entries:
        past = stream.segment(layer)
        entries = Entries(*self._entries(call, layer), past.valid, past.bias, past.blocks)
        entries = entries.by_head() if part.heads > 1 else entries
        return replace(entries, tables=part.tables or {})

    @staticmethod
    def _lost(part: Leaving, held: Entries) -> Tensor | None:
        """The columns that leave, bool `[B, n]` of all that the cache holds."""
        if part.lost is None:
            return None
        lost = part.lost.repeat_interleave(part.heads, 0)
        return F.pad(lost, (held.keys.shape[2] - lost.shape[1], 0))

    def _book(self, call: Call, part: Leaving, layer: int, before: int, after: int, gone: int) -> None:
        book = self.attachment.ledger.visit
        if part.lost is not None:
            book(call.run, Event("cache", layer, "end", part.by, "forget", before, after, (), True, part.gone))
        if part.event is not None:
            book(call.run, replace(part.event, before=before, after=after, gone=gone if part.event.ragged else None))


def lost_below(call: Call, layers: Iterable[int]) -> dict[int, Leaving]:
    """Columns, by layer, whose tokens left in later layers at cuts that caches follow.

    Args:
        call: a prefill that ran.
        layers: whose caches hold entries.
    """
    found = {}
    for layer in layers:
        later = [cut for cut in call.cuts if cut.layer > layer]
        followed = [cut for cut in later if cut.forget]
        gone = sum(cut.gone for cut in followed)
        if not gone:
            continue
        shot = [shot for first, shot in call.places if first <= layer][-1]
        at = torch.arange(shot.length, device=shot.place.device).expand_as(shot.place)
        here = _present(at, shot.valid, shot.length)
        lost = torch.zeros_like(here)
        for cut in later:
            at = at.gather(1, cut.moved.source)
            left = _present(at, cut.moved.valid, shot.length)
            lost = lost | (here & ~left) if cut.forget else lost
            here = left
        found[layer] = Leaving([], None, lost, followed[-1].method, gone)
    return found


def _present(at: Tensor, valid: Tensor | None, length: int) -> Tensor:
    """Which of `length` columns some columns come from, bool `[B, length]`; padding comes from none."""
    real = torch.ones_like(at) if valid is None else valid.to(at.dtype)
    return at.new_zeros(len(at), length).scatter_add(1, at, real) > 0


def _without(rows: PromptRows, lost: Tensor | None) -> PromptRows:
    """The rows without columns that leave; counts are asked of the device anew."""
    if lost is None:
        return rows
    pictures = [replace(picture, n=None) for picture in rows.pictures]
    return replace(rows, pictures=pictures, label=torch.where(lost, PAD, rows.label))


def _own(stream: Stream, layer: int, depth: int) -> Segment:
    """The segment of one layer alone; those behind keep what they hold."""
    here = stream.segment(layer)
    if layer + 1 < depth and layer + 1 not in stream.segments:
        stream.segments[layer + 1] = here.copy(layer + 1)
    if here.first != layer:
        here = stream.segments[layer] = here.copy(layer)
    return here
