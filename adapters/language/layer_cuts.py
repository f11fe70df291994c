"""Cuts between two decoder layers: what methods are shown there, and the segment of layers that begins behind a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...core.attachment import Entry
from ...core.stream import Segment, Stream
from ...core.threads import PerThread
from .call import Call, DecoderRun
from .segments import Segments, begin_segment
from .sites import Sites
from .taps import LayerTaps


class LayerCuts:
    """Lets methods act between layers.

    Args:
        lm: gives the text model; a weak reference.
        owner: ticket of the attachment, for the past of a cache.
        points: methods by the layer in front of which they stand.
        sites: lets methods act on rows.
        segments: makes masks and position embeddings of what is left.
        running: what each thread runs.
    """

    def __init__(
        self,
        lm: Callable[[], Any],
        owner: int,
        points: Mapping[int, list[Entry]],
        sites: Sites,
        segments: Segments,
        running: PerThread[DecoderRun],
    ) -> None:
        self.lm = lm
        self.owner = owner
        self.points = points
        self.sites = sites
        self.segments = segments
        self.running = running

    def cut(self, call: Call, layer: int, module: nn.Module, hidden: Tensor, rotary: Any, mask: Any) -> Tensor:
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
        lowered, shortened = call.lowered, False
        for entry in self.points[layer]:
            derive = taps.ahead if entry.site.point == "start" else taps.behind
            hidden, moved = self.sites.visit(call, entry, hidden, derive, renumber_by_default=False)
            if moved is not None:
                shortened = True
                taps.follow(hidden, moved, call.lowered is not lowered)
                call.since = moved.source if call.since is None else call.since.gather(1, moved.source)
                call.gathered.clear()
        call.taps.pop(layer - 1, None)
        if shortened:
            self._begin(call, layer, hidden, past, fresh, call.lowered is not lowered)
        return hidden

    def _begin(self, call: Call, layer: int, hidden: Tensor, past: Segment, fresh: bool, renumbered: bool) -> None:
        """A segment begins at a layer whose rows were cut."""
        assert call.rows is not None
        if call.stream is None:
            call.stream = Stream(self.owner, hidden.shape[0], segments={0: Segment(0)})
            past = call.stream.segment(layer)
        if not fresh:
            past = call.stream.segments[layer] = past.copy(layer)
        past.turned = past.turned or renumbered
        for first, later in call.stream.segments.items():
            later.turned = later.turned or (first > layer and past.turned)
        begin_segment(call, past, hidden)
        call.places.append((layer, call.rows.snapshot()))
