"""What happens to a packed row where a method acts: it is shown stretches of equal length, and answers for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.attachment import Entry
from ...core.ledger import Group as Booked
from ...core.reduction import Reduction
from ...core.row_data import Group
from ...core.row_state import RowNotes, TokenState
from ...core.signals import OF_OUTPUT, TOWER_SIGNALS, Need, TowerTaps
from ...core.stretches import Stretches, joined
from ...core.view import Signal, TokenView
from ..base import TowerSpec
from .cutting import PictureCuts
from .packed_pass import PackedPass
from .packed_taps import packed_signal


class PackedCuts(PictureCuts):
    """Lets methods act on the finest stretches of a packed row, so that no boundary of any block is merged away.

    Args:
        attachment: whose methods.
        spec: the tower as data.
    """

    def __init__(self, attachment: Any, spec: TowerSpec) -> None:
        super().__init__(attachment, spec)
        assert spec.packed is not None
        self.spans = spec.packed.spans

    def ask(  # type: ignore[override]
        self,
        run: PackedPass,
        entry: Entry,
        taps: TowerTaps,
    ) -> tuple[Reduction | None, tuple[Booked, ...]]:
        """As that of a picture's row, group by group of stretches of equal length."""
        made: dict[str, Tensor | None] = {}
        segments = run.segments
        lengths = [segment.n for segment in segments.items]
        pieces: list[tuple[Group, Reduction | None]] = []
        booked = []
        for group in segments.groups("window", taps.tokens.device):
            view = self._view_of(run, entry, taps, group, made)
            reduction = self.attachment.decide(entry, view)
            slots = group.n if reduction is None else reduction.slots
            for _, unit, _ in group.units:
                lengths[unit] = slots
            booked.append(Booked(len(group.units), group.n, slots, group.entered, 0, segments.total))
            pieces.append((group, reduction))
        if all(reduction is None for _, reduction in pieces):
            return None, tuple(booked)
        shorter = segments.shortened(lengths)
        starts = shorter.starts
        stretches = [
            Stretches(group.columns, group.columns.new_tensor([starts[unit] for _, unit, _ in group.units]), reduction)
            for group, reduction in pieces
        ]
        whole = joined(stretches, shorter.total, run.sequence.view_size())
        run.follow(whole, lengths)
        return whole, tuple(booked)

    def _view_of(
        self, run: PackedPass, entry: Entry, taps: TowerTaps, group: Group, made: dict[str, Tensor | None]
    ) -> TokenView:
        size = run.sequence.view_size()
        signals: dict[str, Signal] = {}
        for need in entry.needs:
            signals[need.key] = self._signal_of(run, need, taps, group, made)
        view = TokenView(
            run.gather(taps.tokens.detach(), group),
            entry.site,
            size=None if size is None else run.gather(size, group),
            depth=self.depth,
            grid=group.grid,
            entered=group.entered,
            signals=signals,
            state=TokenState(run, group, entry.index),
            row=RowNotes(run, group, entry.index, entry.scope),
            memory=self.attachment.remember(entry.index),
        )
        self.attachment.bind_user(view, signals)
        return view

    def _signal_of(
        self, run: PackedPass, need: Need, taps: TowerTaps, group: Group, made: dict[str, Tensor | None]
    ) -> Signal:
        """What a group gets under a need; `made` holds what the whole row gave for the groups before."""
        if need.stage is not None:
            value, axis = run.sequence.carried.get(f"{need.name}@{need.layer}", (None, None))
            return None if value is None or axis is None else _part(value, axis, group)
        if need.name not in TOWER_SIGNALS:
            return None  # the user's; bound when the view exists

        def signal() -> Tensor | None:
            axis = TOWER_SIGNALS[need.name].axis
            if need.name not in made:
                value = self.signal(need.name, taps, run)
                if value is not None and axis is not None:
                    for reduction in taps.cuts:
                        value = reduction.gather(value, axis)
                made[need.name] = value
            whole = made[need.name]
            return None if whole is None or axis is None else _part(whole, axis, group)

        return signal

    def signal(self, name: str, taps: TowerTaps, run: PackedPass) -> Tensor | None:
        """A signal of the row as the block saw it, `[1, ...]`."""
        assert run.inside is not None
        layer, segments = run.inside
        return packed_signal(name, taps, segments, self.spans[layer], bool(self.num_prefix))

    def carry(self, run: PackedPass, layer: int, taps: TowerTaps) -> None:  # type: ignore[override]
        """As that of a picture's row."""
        for need in self.tapped.get(layer, ()):
            if need.name in OF_OUTPUT:
                continue
            with torch.no_grad():
                value = self.signal(need.name, taps, run)
            if value is not None:
                run.sequence.carried[f"{need.name}@{layer}"] = (value, TOWER_SIGNALS[need.name].axis)

    def carry_outputs(self, run: PackedPass, layer: int, out: Tensor) -> None:  # type: ignore[override]
        """The whole row, class tokens and padding too, as signals of it are."""
        for need in self.tapped.get(layer, ()):
            if need.name == "outputs":
                run.sequence.carried[f"outputs@{layer}"] = (out.detach(), 1)


def _part(value: Tensor, axis: int, group: Group) -> Tensor:
    """A signal of the whole row, `[1, ...]`, at a group's tokens: `[b, ...]`."""
    return value.movedim(axis, 1)[0][group.columns].movedim(1, axis)
