"""The key-value cache of a planned prefill: what each layer holds, and what leaves it behind the forward."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.attachment import Attachment, Entry
from ..core.cache_signals import apart, queries
from ..core.ledger import Event, Mass
from ..core.signals import MASSES
from ..core.site import Counts
from .planned_rows import PlannedGroup, PlannedRows, share


class PlannedCache:
    """The rows of one prompt as each layer's cache holds them; all rows of a batch are alike.

    Args:
        attachment: methods at their sites.
        depth: layers of the language model.

    Attributes:
        entries: methods by the layer of whose cache they choose.
        acts: whether anything can leave.
        rows: what each layer holds behind the forward, once `enter` was called, and
        lengths: entries of a row that it held at its end.
    """

    def __init__(self, attachment: Attachment, depth: int) -> None:
        self.entries = attachment.of_caches
        self.acts = bool(self.entries) or attachment.forgets
        self.rows: list[PlannedRows] = []
        self._saw: list[PlannedRows] = []
        self._depth = depth
        self.lengths = [0] * depth
        self._lost: dict[int, tuple[int, int]] = {}
        self._open = set(attachment.layout.cached_layers()) if attachment.forgets else set()

    def enter(self, rows: PlannedRows) -> None:
        """The rows as they enter the language model."""
        if self.acts:
            self.rows = [rows.copy() for _ in range(self._depth)]
            self._saw = [rows.copy()] * self._depth
            self.lengths = [rows.length] * self._depth

    def follow(self, before: PlannedRows, rows: PlannedRows, first: int, entry: Entry) -> None:
        """A cut between layers: later layers hold less, and layers before it where the method says so.

        Args:
            before: the rows in front of it.
            rows: and behind it.
            first: the first layer that gets them so.
            entry: the method at its site.
        """
        for layer in range(first, len(self.rows)):
            self.rows[layer], self._saw[layer], self.lengths[layer] = rows.copy(), rows.copy(), rows.length
        if entry.site.forget and rows.length < before.length:
            for layer in (layer for layer in self._open if layer < first):
                self.rows[layer].lose(before, rows)
                lost = self._lost.get(layer, (0, 0))[1]
                self._lost[layer] = entry.index, lost + before.length - rows.length

    def dealt(self) -> dict[int, list[int | None]]:
        """By layer, slots of each view row where its method says what all layers keep together: evenly is assumed."""
        layers: dict[int, list[int]] = {}
        for layer, entry in self.entries.items():
            layers.setdefault(entry.index, []).append(layer)
        found: dict[int, list[int | None]] = {}
        for own in layers.values():
            groups = {layer: self.rows[layer].groups(self.entries[layer].scope) for layer in own}
            found.update({layer: [None] * len(groups[layer]) for layer in own})
            for number in range(min(map(len, groups.values()))):
                views = [groups[layer][number] for layer in own]
                counts = [self._counts(self.entries[layer], view) for layer, view in zip(own, views)]
                total = self.entries[own[0]].method.together(counts)
                parts = [] if total is None else share(total, [view.n for view in views])
                for layer, slots in zip(own, parts):
                    found[layer][number] = slots
        return found

    def _counts(self, entry: Entry, view: PlannedGroup) -> Counts:
        return Counts(entry.asked, view.n, view.entered, 0, self._depth, view.grid, view.frames, view.cells)

    def masses(self, batch: int) -> Iterator[Mass]:
        """Attention that is summed for methods while layers run; each layer saw all of its row."""
        for layer, entry in self.entries.items():
            length, window = self.lengths[layer], entry.site.window
            for sample in self._saw[layer].groups("sample"):
                together, by_row = apart({need.name for need in entry.needs} & MASSES, entry.site.every)
                taken = [queries(together, length, sample.text, window), by_row * min(window, length)]
                yield from (Mass(layer, batch, rows, length) for rows in taken if rows)

    def forgotten(self, batch: int) -> Iterator[Event]:
        """Layers that lost entries with later cuts; asked once methods have chosen, too."""
        for layer, (index, lost) in sorted(self._lost.items()):
            before, after = self.lengths[layer], self.rows[layer].length
            yield Event("cache", layer, "end", index, "forget", before, after, (), True, batch * lost)
