"""Entries leave the key-value cache behind a prefill: what methods see of a layer's cache, and what they leave.

While a layer runs, the attention that its columns receive is summed. Behind the forward all methods decide, then all
layers change, so that an error leaves the cache as it was. Text stays; so do entries of pictures of earlier calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.attachment import Attachment
from ...core.cache_signals import mass
from ...core.eviction import Entries, Piece, evicted, staying
from ...core.hooks import replaying
from ...core.ledger import Event
from ...core.pictures import PAD
from ...core.rows import PromptRows
from ...core.signals import MASSES
from ...core.stream import Segment, Stream
from ...core.threads import PerThread
from ...errors import CacheError, VlmtokWarning
from .. import host_objects
from .cache_views import CacheViews, Seen
from .call import Brought, Call, DecoderRun
from .segments import Segments
from .taps import LayerTaps


@dataclass(frozen=True, eq=False)
class Leaving:
    """What leaves of a layer's cache.

    Attributes:
        pieces: what its method left of its views.
        event: of that visit, or None where no method acts.
        lost: bool `[B, L]`, columns of the rows of this call that leave with tokens of later layers, or None.
        by: the method that cut them there last.
        gone: how many these are, of all rows together.
    """

    pieces: list[Piece]
    event: Event | None = None
    lost: Tensor | None = None
    by: int = -1
    gone: int = 0

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
    """

    def __init__(
        self, attachment: Attachment, lm: Callable[[], Any], segments: Segments, running: PerThread[DecoderRun]
    ) -> None:
        self.attachment = attachment
        self.lm = lm
        self.segments = segments
        self.running = running
        self.entries = {entry.site.layer or 0: entry for entry in attachment.at("cache")}
        self.follows = any(entry.site.forget for entry in attachment.at("decoder"))
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

    def reads(self, layer: int) -> bool:
        """Whether a method asks for attention that the entries of a layer received."""
        entry = self.entries.get(layer)
        return entry is not None and any(need.name in MASSES for need in entry.needs)

    def install(self, layers: Iterable[nn.Module]) -> None:
        """Hooks behind the layers whose caches methods see."""
        for layer, block in enumerate(layers):
            if layer in self.entries:
                self.attachment.hook(block, "post", self.after, layer)

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
        blind = self.attachment.layout.stages["cache"].blind
        why = host_objects.why_entries_stay(cache, [layer for layer in layers if layer not in blind])
        if why is not None:
            raise CacheError(
                f"entries cannot leave this cache: {why}; use the default cache (leave cache_implementation out)"
            )

    # ------------------------------------------------------------------ while layers run
    def after(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Layer hook: the rows as this layer had them, and the attention that they received."""
        running = self.running.mine()
        call = running.call
        if call is None or call.rows is None or call.cache is None or running.muted or replaying():
            return
        rows, entry = call.rows, self.entries[layer]
        shot = replace(rows, pictures=[replace(picture) for picture in rows.pictures], carried=dict(rows.carried))
        masses = {}
        for need in entry.needs:
            if need.name in MASSES:
                key = (need.name, entry.site.window if need.name == "recent_mass" else 0)
                masses[key] = self._mass(*key, call, layer, module, host_objects.hidden_of(module, output))
        if not self.keeps_taps(layer):
            call.taps.pop(layer, None)
        call.brought[layer] = Brought(shot, masses)

    def keeps_taps(self, layer: int) -> bool:
        """Whether a method at the end of a layer reads its taps, too."""
        return any(entry.site.point == "end" for entry in self.attachment.at("decoder", layer))

    @torch.no_grad()
    def _mass(self, name: str, window: int, call: Call, layer: int, module: Any, hidden: Tensor) -> Tensor:
        """A mass of `cache_signals`, fp32 `[B, L, Hkv]`; padding and drafts give none and get none."""
        rows = call.rows
        assert rows is not None
        keys = host_objects.keys_in(module, call.cache, layer)
        table = torch.zeros(rows.batch, rows.length, keys.shape[1], dtype=torch.float32, device=keys.device)
        taps = LayerTaps(self.lm, self.segments, self.running, call, layer + 1, None, hidden, None, None, Segment(0))
        for group in rows.groups("sample", by_text=True, by_length=True):
            found = mass(name, taps.behind(group), keys.shape[1], window)
            columns = rows.valid_columns(group)
            if columns is None:
                columns = torch.arange(rows.length, device=keys.device).expand(len(group.units), -1)
            columns = columns[:, : found.shape[2]]
            table[group.index[:, None], columns] = found.transpose(1, 2)
        return table

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
        if call.rows is None or not self.acts:
            return {}
        if call.cache is None:
            self._say_uncached()
            return {}
        self.check(call.cache)
        found = self._lost(call)
        seen: dict[int, Seen] = {}
        for layer, entry in self.entries.items():
            brought = call.brought.get(layer)
            if brought is not None:
                keys, values = host_objects.entries_in(self.lm().layers[layer], call.cache, layer)
                rows = _without(brought.rows, found[layer].lost if layer in found else None)
                seen[layer] = Seen(entry, rows, brought, keys, values, keys.shape[2] - brought.rows.length)
        for layer, (pieces, event) in self.views.ask(seen).items():
            found[layer] = replace(found.get(layer, Leaving([])), pieces=pieces, event=event)
            if not found[layer].changes and call.run is not None:
                self.attachment.ledger.visit(call.run, event)
        call.brought.clear()
        leaving = {layer: part for layer, part in found.items() if part.changes}
        if leaving:
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

    def _lost(self, call: Call) -> dict[int, Leaving]:
        """Columns, by layer, whose tokens left in later layers at cuts that caches follow."""
        blind = self.attachment.layout.stages["cache"].blind
        found = {}
        for layer in (layer for layer in range(len(self.segments.kinds)) if layer not in blind):
            later = [cut for cut in call.cuts if cut.layer > layer]
            followed = [cut for cut in later if cut.forget]
            gone = sum(cut.gone for cut in followed)
            if not gone:
                continue
            length = [shot.length for first, shot in call.places if first <= layer][-1]
            at = torch.arange(length, device=later[0].moved.source.device).expand(len(later[0].moved.source), -1)
            lost = torch.zeros_like(at, dtype=torch.bool)
            for cut in later:
                left = at.gather(1, cut.moved.source)
                if cut.forget:
                    real = torch.ones_like(left) if cut.moved.valid is None else cut.moved.valid.to(left.dtype)
                    stays = torch.zeros_like(lost, dtype=left.dtype).scatter_add(1, left, real) > 0
                    lost = lost | (torch.zeros_like(lost).scatter(1, at, True) & ~stays)
                at = left
            found[layer] = Leaving([], None, lost, followed[-1].method, gone)
        return found

    def apply(self, call: Call, stream: Stream, leaving: Mapping[int, Leaving]) -> None:
        """Takes entries out.

        Args:
            call: that ran, whose columns are past now.
            stream: its past, which is brought up to date.
            leaving: from `decide`.

        Raises:
            CacheError: nothing would be left of a row in some layer.
        """
        held = {layer: self._held(call, stream, layer) for layer in sorted(leaving)}
        stay = {
            layer: staying(held[layer], leaving[layer].pieces, self._padded(leaving[layer], held[layer]))
            for layer in held
        }
        # All counts are read at once, so that a device is asked once.
        counts = torch.stack([mask.sum(2)[:, 0] for mask in stay.values()]).tolist()
        for layer, left in zip(held, counts):
            if min(left) == 0:
                raise CacheError(
                    f"nothing would stay in the cache of layer {layer}, by which hosts tell a filled cache; keep an "
                    "entry, or give the prompt some text"
                )
        for layer, left in zip(held, counts):
            now = evicted(held[layer], leaving[layer].pieces, stay[layer], max(left))
            host_objects.put_entries(call.cache, layer, now.keys, now.values)
            segment = _own(stream, layer, len(self.segments.kinds))
            self._book(call, leaving[layer], layer, segment.length, max(left))
            segment.length, segment.bias, segment.blocks = max(left), now.bias, now.blocks
            segment.valid = now.valid if min(left) < max(left) else None

    def _held(self, call: Call, stream: Stream, layer: int) -> Entries:
        keys, values = host_objects.entries_in(self.lm().layers[layer], call.cache, layer)
        past = stream.segment(layer)
        return Entries(keys, values, past.valid, past.bias, past.blocks)

    @staticmethod
    def _padded(part: Leaving, held: Entries) -> Tensor | None:
        """The columns that leave, bool `[B, n]` of all that the cache holds."""
        return None if part.lost is None else F.pad(part.lost, (held.keys.shape[2] - part.lost.shape[1], 0))

    def _book(self, call: Call, part: Leaving, layer: int, before: int, after: int) -> None:
        assert call.run is not None
        book = self.attachment.ledger.visit
        if part.lost is not None:
            book(call.run, Event("cache", layer, "end", part.by, "forget", before, after, (), True, part.gone))
        if part.event is not None:
            gone = call.run.rows * (before - after) if part.event.ragged else None
            book(call.run, replace(part.event, before=before, after=after, gone=gone))


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
