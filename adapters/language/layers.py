"""Hooks on decoder layers: cuts where methods stand, and what the layers behind a cut get in place of the host's own.

Hosts hand all layers the same rotary embeddings and mask; those behind a cut need others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Entry
from ...core.hooks import replaying
from ...core.stream import Segment, Stream
from ...core.threads import PerThread
from .. import host_objects, hosts
from ..hosts import Arguments
from .call import Call, DecoderRun, LayerCut
from .checks import check_hidden, check_layer
from .masked import note_masked
from .segments import Segments, begin_segment
from .sites import Sites
from .spec import VLMSpec
from .taps import LayerTaps


class Layers:
    """Lets methods act between layers.

    Args:
        spec: the family.
        lm: gives the text model; a weak reference.
        owner: number of the attachment, for the past of a cache.
        points: methods by the layer in front of which they stand.
        sites: lets methods act on rows.
        segments: makes masks and position embeddings of what is left.
        running: what each thread runs.
        arguments: of the layers.
        flash: whether the attention reads positions.
        sources: layers that read keys of another one, and which.
        follows: whether caches follow cuts of this call.
        told: layers whose masks stand for those of others, and of how many.
    """

    def __init__(
        self,
        spec: VLMSpec,
        lm: Callable[[], Any],
        owner: int,
        points: Mapping[int, list[Entry]],
        sites: Sites,
        segments: Segments,
        running: PerThread[DecoderRun],
        arguments: Mapping[int, Arguments],
        flash: bool,
        sources: Mapping[int, int],
        follows: bool,
        told: Mapping[int, int],
    ) -> None:
        self.spec = spec
        self.lm = lm
        self.owner = owner
        self.points = points
        self.sites = sites
        self.segments = segments
        self.running = running
        self.arguments = arguments
        self.flash = flash
        self.sources = sources
        self.follows = follows
        self.told = told

    def check_cache(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the first layer that keeps keys: the cache that is really used is the one that was seen."""
        running = self.running.mine()
        if running.muted or replaying() or torch.compiler.is_compiling():
            return
        cache = host_objects.cache_in(module, self.arguments[layer], args, kwargs)
        if cache is None:
            return
        call = running.call
        if call is not None and call.cache is None:
            call.cache = cache  # the text model made it
        if getattr(cache, "is_compileable", False):
            return  # of one fixed length, refused where something is cut; asking how full it is waits for a GPU
        held = host_objects.length_of(module, cache, layer)
        if held != running.held or (call is not None and call.cache is not cache):
            raise hosts.changed(
                self.lm(),
                f"its layer {layer} works on a cache of {held} columns, and the one that was seen in the call of "
                f"the text model holds {running.held}",
            )

    def layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer pre-hook: cuts where a method stands, and gives later layers what fits their rows."""
        running = self.running.mine()
        call = running.call
        if call is None or running.muted or replaying():
            return None
        arguments = self.arguments[layer]
        hidden = arguments.get(hosts.HIDDEN, args, kwargs)
        rotary = arguments.get(hosts.ROTARY, args, kwargs)
        if call.rows is not None and layer in self.points:
            check_hidden(module, call, hidden)
            check_layer(module, arguments.called(args, kwargs), arguments.names, self.spec, hidden)
            hidden = self._cut(call, layer, module, hidden, rotary, arguments.get(hosts.MASK, args, kwargs))
        holder = self.sources.get(layer, layer)
        segment = None if call.stream is None else call.stream.segment(holder)
        if segment is None or (segment.first == 0 and segment.bias is None):
            if segment is not None:
                self._note_masked(layer, module, hidden, arguments.get(hosts.MASK, args, kwargs))
            if self.flash and call.moved:
                return arguments.put(args, kwargs, {hosts.POSITIONS: None})  # gaps would read as packed sequences
            return None
        if segment.first not in call.segments:
            begin_segment(call, segment, hidden)
        mask = self.segments.mask(call, segment, holder, hidden)
        self._note_masked(layer, module, hidden, mask)
        changes = {
            hosts.HIDDEN: hidden,
            hosts.ROTARY: self.segments.rotary(call, segment, layer, rotary, hidden),
            hosts.MASK: mask,
            hosts.POSITIONS: None,
        }
        for role in self.spec.layer_args:
            value = arguments.get(role, args, kwargs)
            if call.input_columns is not None and isinstance(value, Tensor) and value.shape[1] == call.width:
                index = call.input_columns.unsqueeze(-1).expand(-1, -1, value.shape[-1])
                changes[role] = value.expand(hidden.shape[0], -1, -1).gather(1, index)
        return arguments.put(args, kwargs, changes)

    def tell(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of a layer in front of all that are told of: which mask the host made for the rows of a cut."""
        running = self.running.mine()
        if running.call is None or running.call.stream is None or running.muted or replaying():
            return
        hidden, mask = (self.arguments[layer].get(role, args, kwargs) for role in (hosts.HIDDEN, hosts.MASK))
        self._note_masked(layer, module, hidden, mask)

    def _note_masked(self, layer: int, module: nn.Module, hidden: Tensor, mask: Any) -> None:
        kind, layers = self.segments.kinds[layer], self.told.get(layer, 1)
        note_masked(self.lm().config, module, kind, hidden, mask, layers)

    def _cut(self, call: Call, layer: int, module: nn.Module, hidden: Tensor, rotary: Any, mask: Any) -> Tensor:
        """Methods at the end of the layer before and at the start of this one.

        Args:
            call: a prefill with pictures.
            layer: the layer to come.
            module: it.
            hidden: `[B, L, C]`, its input.
            rotary: position embeddings, and
            mask: the mask that the host hands it.

        Returns:
            Its input as it is now.
        """
        rows = call.rows
        assert rows is not None
        past = Segment(0) if call.stream is None else call.stream.segment(layer)
        fresh = past.first == layer and layer > 0  # an earlier call cut here: the caches above and below differ
        above = past if call.stream is None else call.stream.segment(layer - 1)
        if fresh and past.shift is not above.shift and past.shift is not None:
            old = past.shift if above.shift is None else past.shift - above.shift
            rows.positions = rows.positions - old[:, None]
        if above.first in call.segments:
            rotary = self.segments.rotary(call, above, layer, rotary, hidden)
            mask = None if fresh else self.segments.mask(call, above, layer, hidden)
        taps = LayerTaps(
            self.lm, self.segments, self.running, call, layer, module, hidden, rotary, None if fresh else mask, past
        )
        drop, shortened = call.position_drop, False
        for entry in self.points[layer]:
            derive = taps.ahead if entry.site.point == "start" else taps.behind
            held = sum(rows.lengths)
            hidden, moved = self.sites.visit(call, entry, hidden, derive)
            if moved is not None:
                shortened = True
                if self.follows:
                    gone = held - sum(rows.lengths)
                    call.cuts.append(LayerCut(layer, entry.index, entry.site.forget, moved, gone))
                taps.follow(hidden, moved, call.position_drop is not drop)
                call.input_columns = (
                    moved.source if call.input_columns is None else call.input_columns.gather(1, moved.source)
                )
                call.gathered.clear()
        call.taps.pop(layer - 1, None)
        if shortened:
            self._begin(call, layer, hidden, past, fresh, call.position_drop is not drop)
        return hidden

    def _begin(self, call: Call, layer: int, hidden: Tensor, past: Segment, fresh: bool, renumbered: bool) -> None:
        """A segment begins at a layer whose rows were cut."""
        assert call.rows is not None
        if call.stream is None:
            call.stream = Stream(self.owner, hidden.shape[0], segments={0: Segment(0)})
            past = call.stream.segment(layer)
        if not fresh:
            past = call.stream.segments[layer] = past.copy(layer)
        past.renumbered = past.renumbered or renumbered
        for first, later in call.stream.segments.items():
            later.renumbered = later.renumbered or (first > layer and past.renumbered)
        begin_segment(call, past, hidden)
        call.places.append((layer, call.rows.snapshot()))
