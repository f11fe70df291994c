"""Methods asked on tensors without data, so that what they compute can be counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.attachment import Attachment, Entry
from ..core.ledger import Event, Group, StageRun
from ..core.model_shape import BlockShape, ModelShape, TowerShape
from ..core.sequence import TowerRow
from ..core.signals import DECODER_SIGNALS, OF_OUTPUT, TOWER_SIGNALS, DecoderTaps, Need, TowerTaps
from ..core.site import Site, named, runs_of_layers
from ..core.view import Signal, TokenView
from ..kernels import dispatch, exact
from .counting import MacCounter
from .flops import decoder_profiles
from .meta import Memo, empty, on_meta


@contextmanager
def rehearsal() -> Iterator[Callable[[], int]]:
    """Context that counts MACs of torch definitions and leaves no trace in `vlmtok.kernels.ran`."""
    ran = dispatch._ran.copy()
    try:
        with dispatch.use("torch"), torch.no_grad(), MacCounter() as counter:
            yield lambda: counter.macs
    finally:
        dispatch._ran.clear()
        dispatch._ran.update(ran)


Give = Callable[[Need], Signal]
"""The signal of a need."""


class Rehearsal:
    """One pass again, without data.

    Attributes:
        signals: MACs of signals so far.
        elsewhere: MACs that only gave a signal its shape here; they are booked where it is made.
        notes: what could not be counted, and
        failed: methods that do not run without data, with what they raised and where.
    """

    def __init__(self, attachment: Attachment, shape: ModelShape, run: StageRun, counted: Callable[[], int]) -> None:
        self.attachment = attachment
        self.shape = shape
        self.run = run
        self.counted = counted
        self.signals = 0
        self.elsewhere = 0
        self.notes: list[str] = []
        self.failed: dict[tuple[str, str], list[Site]] = {}
        self.states: dict[int, dict[str, Any]] = {}
        self.rows: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
        self.memory = {i: on_meta(attachment.remember(i)) for i in range(len(attachment.methods))}
        self.outputs: dict[int, int] = {}
        self.pending: dict[int, int] = {}

    # ------------------------------------------------------------------ passes
    def tower(self) -> None:
        """A pass through a tower, and the visits at ``features``."""
        run, stage = self.run, self.run.stage
        tower = self.shape.vision if stage == "vision" else self.shape.text
        assert tower is not None
        tapped = self.attachment.tapped(stage) if stage == "vision" else {}
        row = TowerRow(tower.protected, run.entered - tower.protected)
        for layer in range(tower.depth):
            events = [e for e in run.events if e.stage == stage and e.layer == layer]
            mid = bool(self.attachment.at(stage, layer, "mid"))
            met = None
            for point in ("start", "mid", "end"):
                if point == "mid":
                    met = row.length  # what attention saw; its q and k stay that long behind a cut
                if point == ("mid" if mid else "end"):
                    self._carry(tower, layer, row, tapped.get(layer, []))
                for event in (e for e in events if e.point == point and e.method >= 0):
                    row = self._tower_visit(tower, layer, row, event, met)
            self.settle()
            row = TowerRow(row.prefix, row.n)
            for event in (e for e in events if e.kind == "spread"):
                row = TowerRow(row.prefix, event.after - row.prefix)
        for event in (e for e in run.events if e.stage == "features"):
            for group in event.groups:
                self.ask(event, group, tower.blocks[-1].width, partial(self.brought, group=group))

    def apart(self, name: str, taps: TowerTaps) -> Tensor | None:
        """A signal for its shape alone."""
        before = self.counted()
        made = TOWER_SIGNALS[name].make(taps)
        self.elsewhere += self.counted() - before
        return made

    def decoder(self) -> None:
        """A call of a language model."""
        language = self.shape.language
        assert language is not None
        profile = decoder_profiles(self.run, language.blocks)[1]
        width = language.blocks[0].width
        for event in self.run.events:
            if event.method < 0 or event.stage == "cache":
                continue
            for group in event.groups:
                layer = event.layer or 0
                keys = profile.layers[layer].keys
                if _ahead(event):  # the layer has not run: it will see what arrives here
                    keys += event.before - profile.layers[layer].queries
                taps = self._decoder_taps(language.blocks[layer], event, group, keys)
                self.ask(event, group, width, self._decoder_signals(taps, group, width))

    # ------------------------------------------------------------------ towers
    def _tower_visit(self, tower: TowerShape, layer: int, row: TowerRow, event: Event, met: int | None) -> TowerRow:
        width, length = tower.blocks[layer].width, met or event.before
        if event.kind == "insert":
            added = event.after - event.before
            group = Group(self.run.rows, row.n, row.n, self.run.entered - row.prefix, 0, row.length)
            give = self._tower_signals(tower, layer, row, event, group, length)
            self.ask(event, group, width, give, insert=True)
            self.pending[event.method] = self.pending.get(event.method, 0) + added
            return TowerRow(row.prefix, row.n, row.inserted + added)
        for group in event.groups:
            own = TowerRow(row.prefix, group.n, row.inserted)
            self.ask(event, group, width, self._tower_signals(tower, layer, own, event, group, length))
        return TowerRow(row.prefix, event.after - row.prefix - row.inserted, row.inserted)

    def _taps(
        self, tower: TowerShape, layer: int, row: TowerRow, rows: int, length: int, captured: bool, method: int = -1
    ) -> TowerTaps:
        """Taps of a block for `rows` view rows; the batch has `length` tokens a row.

        q and k that the block does not show are computed for the whole batch each time they are asked for; one map for
        q, k and v is called once.
        """
        block = tower.blocks[layer]
        shared = False

        def made(heads: int) -> Tensor:
            nonlocal shared
            if not captured and not shared:
                x = empty(self.run.rows, length, block.width)
                shared = tower.fused
                outputs = block.heads + 2 * block.kv_heads if shared else heads
                torch.matmul(x, empty(block.width, outputs * block.head_width))
            return empty(rows, heads, row.length, block.head_width)

        outputs = self.outputs.get(method)
        return TowerTaps(
            row,
            empty(rows, row.length, block.width),
            lambda: made(block.heads),
            lambda: made(block.kv_heads),
            1.0,
            inserted=None if outputs is None else empty(rows, outputs, block.width),
        )

    def _tower_signals(
        self, tower: TowerShape, layer: int, row: TowerRow, event: Event, group: Group, length: int
    ) -> Give:
        captured = not tower.recomputed and event.point != "start"
        taps = self._taps(tower, layer, row, group.rows, length, captured, event.method)

        def give(need: Need) -> Signal:
            if need.stage is not None:
                return self.brought(need, group)
            if need.name not in TOWER_SIGNALS:
                return None
            return lambda: self.spent(lambda: TOWER_SIGNALS[need.name].make(taps))

        return give

    def _carry(self, tower: TowerShape, layer: int, row: TowerRow, needs: list[Need]) -> None:
        """Signals that later sites wait for are made whether or not they are asked for."""
        taps = self._taps(tower, layer, row, self.run.rows, row.length, not tower.recomputed)
        for need in needs:
            if need.name not in OF_OUTPUT:
                self.spent(lambda need=need: TOWER_SIGNALS[need.name].make(taps))  # type: ignore[misc]

    def brought(self, need: Need, group: Group) -> Signal:
        """A tower's signal as it arrives at a later site: its shape, what it cost is booked where it is made."""
        tower = self.shape.vision
        if tower is None or need.name not in TOWER_SIGNALS:
            return None
        taps = self._taps(tower, need.layer or 0, TowerRow(tower.protected, group.n), group.rows, 0, True)
        return lambda: self.apart(need.name, taps)

    def inserted(self, tower: TowerShape, entry: Entry, row: TowerRow) -> int:
        """How many tokens a method would put in at the start of a block."""
        group = Group(self.run.rows, row.n, row.n, self.run.entered - row.prefix, 0, row.length)
        event = Event(self.run.stage, entry.site.layer, "start", entry.index, "insert", row.length, row.length)
        give = self._tower_signals(tower, entry.site.layer or 0, row, event, group, row.length)
        with torch.no_grad():
            tokens = entry.method.insert(self.view(entry, group, tower.blocks[0].width, give))
        count = 0 if tokens is None else tokens.shape[1]
        self.pending[entry.index] = self.pending.get(entry.index, 0) + count
        return count

    def settle(self) -> None:
        """A block ended: what was put in is gone, its outputs stay."""
        self.outputs.update({method: count for method, count in self.pending.items() if count})
        self.pending.clear()

    # ------------------------------------------------------------------ language models
    def _decoder_signals(self, taps: DecoderTaps, group: Group, width: int) -> Give:
        def give(need: Need) -> Signal:
            if need.stage is not None:
                return self.brought(need, group)
            if need.name == "text" and group.text:
                return empty(group.rows, group.text, width)
            if need.name not in DECODER_SIGNALS:
                return None
            return lambda: self.spent(lambda: DECODER_SIGNALS[need.name](taps))

        return give

    def _decoder_taps(self, block: BlockShape, event: Event, group: Group, keys: int) -> DecoderTaps:
        """Taps of the layer that ran (``end``), or of the one to come, from its own projections."""
        ahead, batch, d = _ahead(event), self.run.rows, block.head_width

        def q(places: Tensor) -> Tensor:
            if not ahead:
                return empty(group.rows, block.heads, places.shape[1], d)
            outputs = block.heads * d
            made = empty(group.rows, places.shape[1], block.width) @ empty(block.width, (1 + block.gated) * outputs)
            return made[..., :outputs].unflatten(-1, (block.heads, d)).transpose(1, 2)

        def k() -> Tensor:
            if ahead:  # all rows are projected, the group's are taken
                torch.matmul(empty(batch, event.before, block.width), empty(block.width, block.kv_heads * d))
            return empty(group.rows, block.kv_heads, keys, d)

        index = torch.int64
        return DecoderTaps(
            q,
            k,
            1.0,
            lambda places: empty(group.rows, 1, places.shape[1], keys),
            empty(group.rows, group.length, dtype=index),
            empty(group.rows, group.n, dtype=index),
            empty(group.rows, group.text, dtype=index),
            group.mixed,
            empty(group.rows, 2, 2, group.length),
            normed=lambda places: empty(group.rows, places.shape[1], block.width),
            active=lambda places: empty(group.rows, places.shape[1], block.hidden, dtype=torch.bool),
        )

    # ------------------------------------------------------------------ asking
    def spent(self, make: Callable[[], Tensor | None]) -> Tensor | None:
        """Makes a signal and books what it took."""
        before = self.counted()
        try:
            return make()
        finally:
            self.signals += self.counted() - before

    def entry(self, event: Event) -> Entry:
        """The method of a visit at its site."""
        found = self.attachment.at(event.stage, event.layer, event.point)
        return next(entry for entry in found if entry.index == event.method)

    def ask(self, event: Event, group: Group, width: int, give: Give, insert: bool = False) -> None:
        """Shows a method a view without data."""
        entry = self.entry(event)
        view = self.view(entry, group, width, give)
        self.tried(entry, view, lambda: entry.method.insert(view) if insert else entry.method.reduce(view))

    def tried(self, entry: Entry, view: TokenView, ask: Callable[[], object]) -> None:
        """Asks a method something of a view without data, and notes where it does not answer."""
        name = type(entry.method).__name__
        if any(need.key in self.attachment.user for need in entry.needs):
            self.notes.append(f"the user's own signals for {name} are not counted")
        try:
            with exact(view.tokens.device):
                ask()
        except Exception as problem:  # a method of a third party may do anything
            self.failed.setdefault((name, str(problem)), []).append(entry.site)

    def said(self) -> list[str]:
        """What could not be counted, and why; layers in which a method fails alike are one."""
        found = list(self.notes)
        for (name, problem), sites in self.failed.items():
            once = list(dict.fromkeys(sites))
            places = ", ".join(named(run) for run in runs_of_layers(once, lambda site: site, lambda site: None))
            found.append(f"{name} does not run without data at {places}, its cost there is missing: {problem}")
        return found

    def view(self, entry: Entry, group: Group, width: int, give: Give) -> TokenView:
        """A view without data.

        Args:
            entry: the method at its site.
            group: the view as counts.
            width: channels.
            give: the signal of a need.
        """
        stage = self.attachment.layout.stages[entry.site.stage]
        signals: dict[str, Signal] = {}
        for need in entry.needs:
            own = need.key in self.attachment.user
            signals[need.key] = empty(group.rows, group.n) if own else give(need)
        tower = self.shape.vision
        grid = None if tower is None else tower.grid
        return TokenView(
            empty(group.rows, group.n, width),
            entry.asked,
            size=empty(group.rows, group.n),
            num_prefix=stage.num_prefix,
            depth=stage.depth,
            grid=grid if grid is not None and grid[0] * grid[1] == group.n else None,
            entered=group.entered,
            columns=empty(group.rows, group.n, dtype=torch.int64),
            signals=signals,
            state=Memo(self.states.setdefault(entry.index, {}), (group.rows, group.n)),
            row=self._row(entry, group),
            memory=self.memory[entry.index],
            frames=group.frames,
            cells=group.cells,
        )

    def _row(self, entry: Entry, group: Group) -> Memo:
        """What was noted for rows with as much text; what is noted of text has its length."""
        notes = self.rows.setdefault((entry.index, entry.scope), {})
        if group.text not in notes:
            notes[group.text] = dict(next(iter(notes.values()), {}))
        return Memo(notes[group.text], (group.rows,))


def _ahead(event: Event) -> bool:
    """Whether a method of a language model saw what the layer to come would make of the rows."""
    return event.stage == "projected" or event.point == "start"
