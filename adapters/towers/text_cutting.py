"""What happens to the rows of a text tower where a method acts: views of groups, cuts, tokens put in.

`PromptRows` keeps the books, as for language models: the token that the head reads stands anywhere in the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.attachment import Attachment, Entry
from ...core.ledger import Event
from ...core.ledger import Group as Booked
from ...core.row_state import RowNotes, TokenState
from ...core.rows import Group
from ...core.signals import TOWER_SIGNALS, TowerTaps
from ...core.view import Signal, TokenView
from .hook_plan import first_proportional
from .text_state import TextState, TextStep
from .tower_pass import LayerRecord, Pass


@dataclass(frozen=True, eq=False)
class GroupRow:
    """Where a group's tokens and protected tokens stand in rows without padding.

    Attributes:
        columns: int64 `[G, N]`.
        guards: int64 `[G, P]`, end of text first, inserted tokens last.
        length: L.
    """

    columns: Tensor
    guards: Tensor
    length: int

    @property
    def guarded(self) -> int:
        """P."""
        return self.guards.shape[1]

    def inner(self, x: Tensor, dim: int) -> Tensor:
        """The view's tokens along `dim`."""
        return _take(x, self.columns, dim)

    def guard(self, x: Tensor, dim: int) -> Tensor:
        """Protected tokens along `dim`."""
        return _take(x, self.guards, dim)


def _take(x: Tensor, columns: Tensor, dim: int) -> Tensor:
    dim %= x.dim()
    shape = [1] * x.dim()
    shape[0], shape[dim] = columns.shape
    target = list(x.shape)
    target[0], target[dim] = columns.shape
    return x.expand(columns.shape[0], *x.shape[1:]).gather(dim, columns.reshape(shape).expand(target))


class TextCuts:
    """Lets methods act on rows of text.

    Args:
        attachment: whose methods.
        depth: blocks of the tower.
        causal: whether a token sees only what stands before it.
    """

    def __init__(self, attachment: Attachment, depth: int, causal: bool) -> None:
        self.attachment = attachment
        self.depth = depth
        self.causal = causal
        self.proportional_from = first_proportional(attachment, "text", depth)

    def bias(self, run: Pass, x: Tensor, layer: int, record: LayerRecord | None = None) -> Tensor | None:
        """What a block adds to its logits, whether it runs or is still to come."""
        state: TextState = run.sequence
        return state.mask(x.dtype, self.causal, state.rows.size if layer >= self.proportional_from else None)

    def cut(self, run: Pass, entry: Entry, steps: list[Any], x: Tensor, taps: TowerTaps, layer: int) -> Tensor:
        """Shows a view of each group to a method and shortens the rows as it says; arguments as for pictures."""
        state: TextState = run.sequence
        rows = state.rows
        before = rows.length
        pieces, booked = [], []
        for group in rows.groups("sample", by_length=True):
            reduction = self.attachment.decide(entry, self._view(state, entry, group, x, taps))
            slots = group.n if reduction is None else reduction.slots
            booked.append(Booked(len(group.units), group.n, slots, group.entered, 0, group.length))
            if reduction is not None:
                pieces.append((group, reduction))
        if pieces:
            again = [
                (g.index[:, None], g.columns, r, None if rows.size is None else rows.gather(rows.size, g))
                for g, r in pieces
            ]
            x, moved = rows.cut(x, pieces, renumber=False)
            steps.append(TextStep(again, moved.source))
            state.cuts += 1
        kind = "cut" if pieces else "observe"
        ragged = any(reduction.valid is not None for _, reduction in pieces)
        event = Event("text", layer, entry.site.point, entry.index, kind, before, rows.length, tuple(booked), ragged)
        self.attachment.ledger.visit(run.run, event)
        return x

    def _view(self, state: TextState, entry: Entry, group: Group, x: Tensor, taps: TowerTaps) -> TokenView:
        rows = state.rows
        columns = rows.relative(group, group.columns)
        row = GroupRow(columns, rows.relative(group, _guards(state, group)), group.length)
        valid = rows.valid_columns(group)

        def local(t: Tensor, dim: int) -> Tensor:
            t = t[group.index] if t.shape[0] > 1 else t.expand(len(group.units), *t.shape[1:])
            return t if valid is None else _take(t, valid, dim)

        bias = taps.bias
        if bias is not None:
            bias = local(local(bias, 3), 2) if valid is None else _both(bias, group.index, valid)
        outputs = state.outputs.get(entry.index)
        here = TowerTaps(
            row,  # type: ignore[arg-type]
            local(x, 1),
            lambda: local(taps.q(), 2),
            lambda: local(taps.k(), 2),
            taps.scale,
            bias,
            None,
            None if outputs is None else outputs[group.index],
        )
        signals: dict[str, Signal] = {}
        for need in entry.needs:
            if need.name in TOWER_SIGNALS:
                signals[need.key] = partial(TOWER_SIGNALS[need.name].make, here)
            else:
                signals[need.key] = None
        view = TokenView(
            rows.gather(x.detach(), group),
            entry.site,
            size=None if rows.size is None else rows.gather(rows.size, group),
            depth=self.depth,
            entered=group.entered,
            columns=columns,
            signals=signals,
            state=TokenState(rows, group, entry.index),
            row=RowNotes(rows, group, entry.index, entry.scope),
            memory=self.attachment.remember(entry.index),
        )
        self.attachment.bind_user(view, signals)
        return view

    def insert(self, run: Pass, entry: Entry, record: LayerRecord, x: Tensor, taps: TowerTaps) -> Tensor:
        """Asks a method for tokens of each group and puts them at the end of the rows."""
        state: TextState = run.sequence
        rows = state.rows
        tokens: Tensor | None = None
        for group in rows.groups("sample", by_length=True):
            made = entry.method.insert(self._view(state, entry, group, x, taps))
            if made is None or made.shape[1] == 0:
                return x
            if tokens is None:
                tokens = made.new_zeros(x.shape[0], *made.shape[1:])
            tokens = tokens.index_put((group.index,), made)
        if tokens is None:
            return x
        before, count = rows.length, tokens.shape[1]
        tokens = tokens.to(x.dtype)
        rows.append(count)
        state.inserted += count
        state.cuts += 1
        record.taps.setdefault("owners", []).append((entry.index, count))
        record.start.append(tokens)
        record.inserted += count
        event = Event("text", entry.site.layer, "start", entry.index, "insert", before, rows.length)
        self.attachment.ledger.visit(run.run, event)
        return torch.cat([x, tokens], 1)

    def take_off(self, run: Pass, record: LayerRecord, out: Tensor) -> Tensor:
        """Inserted tokens leave; their outputs are a signal of the next insert."""
        state: TextState = run.sequence
        place = at = state.rows.length - state.inserted
        for index, count in record.taps.get("owners", ()):
            state.outputs[index] = out[:, place : place + count]
            place += count
        state.rows.discard(state.inserted)
        state.inserted = 0
        return out[:, :at]

    # ------------------------------------------------------------------ signals for later sites
    def carry(self, run: Pass, layer: int, taps: TowerTaps) -> None:
        """Text towers hand no signals to later sites."""

    def carry_outputs(self, run: Pass, layer: int, out: Tensor) -> None:
        """Text towers hand no signals to later sites."""


def _guards(state: TextState, group: Group) -> Tensor:
    """Columns of end of text, start of text, and inserted tokens, int64 `[G, P]`."""
    place = state.rows.place[group.index]
    end = (place == state.end[group.index][:, None]).to(torch.int64).argmax(1, keepdim=True)
    start = (place == 0).to(torch.int64).argmax(1, keepdim=True)
    last = torch.arange(state.rows.length - state.inserted, state.rows.length, device=place.device)
    return torch.cat([end, start, last.expand(len(group.units), -1)], 1)


def _both(bias: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """`[B or 1, 1, L, L]` at valid rows and columns of a group."""
    picked = bias[index] if bias.shape[0] > 1 else bias.expand(len(index), *bias.shape[1:])
    return _take(_take(picked, valid, 2), valid, 3)
