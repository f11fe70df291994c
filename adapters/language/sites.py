"""Methods at their sites in front of and inside a language model: what they are shown, and the cuts that they ask for.

Every cut of the rows, the tower's own included, is made and booked here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.attachment import Attachment, Entry
from ...core.ledger import Event
from ...core.ledger import Group as Booked
from ...core.reduction import Reduction
from ...core.row_data import ColumnMap, Group
from ...core.row_state import RowNotes, TokenState
from ...core.rows import PromptRows
from ...core.signals import AHEAD, DECODER_SIGNALS, NEURONS, DecoderTaps, Need
from ...core.site import layer_of
from ...core.view import Signal, TokenView
from .call import Call, top
from .handover import Handover, carry_signals
from .projector import Projector
from .row_views import carried_signal, view_of
from .spec import VLMSpec

BY_TEXT = frozenset({"text", "text_attention", "attention_to_text", "text_key_norm", "text_normed", NEURONS})
"""Signals whose view rows must agree in T."""
BY_LENGTH = frozenset(DECODER_SIGNALS)
"""Signals whose view rows must agree in L."""


class Sites:
    """Lets methods act on the rows of a call.

    Args:
        attachment: whose methods.
        spec: the family.
        projector: what the tower's cuts left.
        depth: decoder layers.
    """

    def __init__(self, attachment: Attachment, spec: VLMSpec, projector: Projector, depth: int) -> None:
        self.attachment = attachment
        self.spec = spec
        self.projector = projector
        self.depth = depth
        self.projected = attachment.at("projected")
        self.inside = bool(attachment.at("decoder") or attachment.at("cache") or attachment.skips)

    # ------------------------------------------------------------------ in front of the language model
    def boundary(
        self, call: Call, x: Tensor, ahead: Callable[[Call, Tensor], Callable[[Group], DecoderTaps]]
    ) -> Tensor:
        """What the tower and the projector left out goes, then methods act on the language model's input.

        Args:
            call: a prefill with pictures.
            x: `[B, S, C]`.
            ahead: gives taps of decoder layer 0 for rows as they are, from what it would make of them.

        Returns:
            `[B, L, C]`; `call.moved` says whether it differs.
        """
        rows = call.rows
        assert rows is not None and call.run is not None
        before = x
        handover = self.projector.running.mine().handover
        if handover is not None:
            x = self._hand_over(call, handover, x)
        rows.enter()
        for entry in self.projected:
            asked = any(need.name in AHEAD for need in entry.needs)
            x, _ = self.visit(call, entry, x, ahead(call, x) if asked else None)
        call.moved = x is not before
        if self.inside:
            rows.enter(hold=True)
        return x

    def _hand_over(self, call: Call, handover: Handover, x: Tensor) -> Tensor:
        """Placeholders that the tower's cuts emptied leave; what travels with the rest comes along."""
        rows = call.rows
        assert rows is not None and call.run is not None
        pieces = []
        for group in rows.groups("picture"):
            index = torch.tensor([rows.pictures[i].tower for i in rows.of_pictures(group).tolist()], device=x.device)
            reduction = handover.reduction(index, group.n)
            if reduction is not None:
                pieces.append((group, reduction))
        if pieces:
            call.check_cut()
            before, held = rows.length, sum(rows.lengths)
            renumber = self.spec.positions == "1d"
            x, cut = rows.cut(x, pieces, renumber)
            if renumber:
                _note_drop(call, 0, cut)
            groups = tuple(Booked(len(g.units), g.n, r.slots, g.n) for g, r in pieces)
            ragged = handover.valid is not None
            gone = held - sum(rows.lengths) if ragged else None
            event = Event("features", None, "end", -1, "cut", before, rows.length, groups, ragged, gone)
            self.attachment.ledger.visit(call.run, event)
        carry_signals(rows, handover)
        return x

    # ------------------------------------------------------------------ visiting a method
    def visit(
        self,
        call: Call,
        entry: Entry,
        x: Tensor,
        taps: Callable[[Group], DecoderTaps] | None,
    ) -> tuple[Tensor, ColumnMap | None]:
        """Shows the method its views, group by group, and cuts the rows as it says.

        Args:
            call: a prefill with pictures.
            entry: the method at its site.
            x: `[B, L, C]`, the rows there.
            taps: gives what was tapped of a layer, inside the language model.

        Returns:
            The rows and how their columns moved, or None where they stay.
        """
        rows = call.rows
        assert rows is not None and call.run is not None
        names = {need.name for need in entry.needs}
        groups = rows.groups(entry.scope, bool(names & BY_TEXT), bool(names & BY_LENGTH))
        pieces, booked = [], []
        for group in groups:
            view = self._view(entry, x, rows, group, taps)
            reduction = self.attachment.decide(entry, view)
            slots = group.n if reduction is None else reduction.slots
            of = (group.entered, group.text, group.length, group.mixed, group.frames, group.cells)
            booked.append(Booked(len(group.units), group.n, slots, *of))
            if reduction is not None:
                pieces.append((group, reduction))
        before, held = rows.length, sum(rows.lengths)
        moved, renumber = None, False
        if pieces:
            call.check_cut()
            renumber = self.attachment.layout.positions_at(entry.site) == "renumber"
            x, moved = rows.cut(x, pieces, renumber)
            if renumber:
                layer = 0 if entry.site.layer is None else layer_of(entry.site.layer, entry.site.point)
                _note_drop(call, layer, moved)
            if rows.owner is not None:
                call.steps.append((entry.site, rows.owner, entry.method))
        kind = "cut" if pieces else "observe"
        ragged = any(reduction.valid is not None for _, reduction in pieces)
        event = Event(
            entry.site.stage,
            entry.site.layer,
            entry.site.point,
            entry.index,
            kind,
            before,
            rows.length,
            tuple(booked),
            ragged,
            held - sum(rows.lengths) if ragged else None,
        )
        self.attachment.ledger.visit(call.run, event)
        if pieces and entry.site.separators == "drop":
            x = self._drop_separators(call, entry, x, pieces, renumber)
        return x, moved

    def _drop_separators(
        self, call: Call, entry: Entry, x: Tensor, pieces: list[tuple[Group, Reduction]], renumber: bool
    ) -> Tensor:
        """What stands between rows of patches leaves with a picture that was cut; a cut of its own in the books."""
        rows = call.rows
        assert rows is not None and call.run is not None
        groups = rows.separators({unit[:2] for group, _ in pieces for unit in group.units})
        if not groups:
            return x
        before, held = rows.length, sum(rows.lengths)
        nothing = [(group, Reduction(group.columns[:, :0])) for group in groups]
        x, moved = rows.cut(x, nothing, renumber)
        if renumber:
            _note_drop(call, 0, moved)
        if rows.owner is not None:
            call.steps.append((entry.site, rows.owner, entry.method))
        booked = tuple(Booked(len(group.units), group.n, 0, group.n) for group in groups)
        gone = held - sum(rows.lengths)
        event = Event("projected", None, "end", -1, "cut", before, rows.length, booked, True, gone)
        self.attachment.ledger.visit(call.run, event)
        return x

    def _view(
        self,
        entry: Entry,
        x: Tensor,
        rows: PromptRows,
        group: Group,
        taps: Callable[[Group], DecoderTaps] | None,
    ) -> TokenView:
        made: list[DecoderTaps] = []

        def tapped() -> DecoderTaps:
            if not made:
                assert taps is not None
                made.append(taps(group))
            return made[0]

        signals: dict[str, Signal] = {}
        for need in entry.needs:
            signals[need.key] = _signal(need, x, rows, group, tapped)
        return view_of(
            self.attachment,
            entry,
            rows,
            group,
            rows.gather(x.detach(), group),
            signals,
            depth=self.depth if entry.site.stage == "decoder" else 1,
            state=TokenState(rows, group, entry.index),
            row=RowNotes(rows, group, entry.index, entry.scope),
        )


def _signal(need: Need, x: Tensor, rows: PromptRows, group: Group, tapped: Callable[[], DecoderTaps]) -> Signal:
    """What a view gets under a need: from the tower, of the text, or of a decoder layer."""
    if need.stage is not None:
        return carried_signal(need, rows, group)
    if need.name == "text":

        def text() -> Tensor | None:
            if not group.text:
                return None
            return x.detach()[group.index[:, None], rows.text_columns(group)]

        return text
    if need.name in DECODER_SIGNALS:
        make = DECODER_SIGNALS[need.name]

        def signal() -> Tensor | None:
            with torch.no_grad():
                return make(tapped())

        return signal
    return None


def _note_drop(call: Call, layer: int, moved: ColumnMap) -> None:
    """After a renumbering cut before `layer`: how far positions lie below the host's, gaps of earlier cuts too.

    Rows that lost nothing in it keep their count.
    """
    rows, stream = call.rows, call.stream
    assert rows is not None and call.top is not None
    highest = call.top
    if stream is not None and layer:
        first, here = stream.segments[0].shift, stream.segment(layer).shift
        highest = highest + (0 if first is None else first) - (0 if here is None else here)
    before = torch.zeros_like(highest) if call.position_drop is None else call.position_drop
    call.position_drop = torch.where(moved.dropped > 0, highest - top(rows), before)
