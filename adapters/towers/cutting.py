"""What happens to the row of a vision tower where a method acts: views, cuts, tokens put in, signals on their way."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ...core.attachment import Attachment, Entry
from ...core.ledger import Event, Group
from ...core.reduction import Reduction
from ...core.signals import OF_OUTPUT, TOWER_SIGNALS, Need, TowerTaps, tower_signal
from ...core.view import Signal, TokenView
from ..base import TowerSpec
from .checks import check_maps
from .hook_plan import first_proportional
from .tower_pass import LayerRecord, Pass


class PictureCuts:
    """Lets methods act on rows of patches behind protected tokens.

    Args:
        attachment: whose methods.
        spec: the tower as data.
    """

    def __init__(self, attachment: Attachment, spec: TowerSpec) -> None:
        self.attachment = attachment
        self.stage = spec.stage
        self.depth = len(spec.blocks)
        self.num_prefix = spec.num_prefix
        self.tapped = attachment.tapped(spec.stage)
        self.collectors = tuple(inspect.unwrap(method).__code__ for method in spec.maps)
        self.proportional_from = first_proportional(attachment, spec.stage, self.depth)

    def bias(self, run: Pass, x: Tensor, layer: int, record: LayerRecord | None = None) -> Tensor | None:
        """What a block adds to its logits: the one that runs and has this record, or one that has not run yet."""
        if record is not None:
            return record.bias
        bias: Tensor | None = run.sequence.key_bias(x.dtype) if layer >= self.proportional_from else None
        return bias

    # ------------------------------------------------------------------ cuts
    def cut(self, run: Pass, entry: Entry, steps: list[Any], x: Tensor, taps: TowerTaps, layer: int) -> Tensor:
        """Shows a view to a method and shortens the row as it says.

        Args:
            run: the pass.
            entry: the method at its site.
            steps: of the layer's record, to which the step is added.
            x: `[B, L, C]`, the row there.
            taps: what signals are derived from.
            layer: of the site.
        """
        sequence = run.sequence
        taps.inserted = sequence.outputs.get(entry.index)
        row = sequence.row
        reduction, groups = self.ask(run, entry, taps)
        if reduction is not None:
            check_maps(self.collectors, sequence.cuts)
            asks = layer + (entry.site.point != "start")  # the first layer that attends to what is left
            x, step = sequence.take(reduction, x, biased=self.proportional_from <= asks < self.depth)
            steps.append(step)
            caught = run.record(layer).taps
            caught["cuts"] = (*caught.get("cuts", ()), reduction)
            if sequence.source is not None:
                run.steps.append((entry.site, sequence.source, entry.method))
        if not torch.compiler.is_compiling():
            kind = "observe" if reduction is None else "cut"
            event = Event(
                self.stage, layer, entry.site.point, entry.index, kind, row.length, sequence.row.length, groups
            )
            self.attachment.ledger.visit(run.run, event)
        return x

    def ask(self, run: Pass, entry: Entry, taps: TowerTaps) -> tuple[Reduction | None, tuple[Group, ...]]:
        """Shows a method its view; the reduction of the row that it wants, and what is booked of the view.

        Args:
            run: the pass.
            entry: the method at its site.
            taps: what signals are derived from.
        """
        row = run.sequence.row
        view = self._view(run, entry, taps)
        reduction = self.attachment.decide(entry, view)
        slots = row.n if reduction is None else reduction.slots
        return reduction, (Group(view.tokens.shape[0], row.n, slots, run.sequence.entered, 0, row.length),)

    def _view(self, run: Pass, entry: Entry, taps: TowerTaps) -> TokenView:
        sequence = run.sequence
        signals: dict[str, Signal] = {}
        for need in entry.needs:
            signals[need.key] = self._signal(run, need, taps)
        view = TokenView(
            sequence.row.inner(taps.tokens.detach(), 1),
            entry.site,
            size=sequence.view_size(),
            num_prefix=self.num_prefix,
            depth=self.depth,
            grid=run.grid,
            entered=sequence.entered,
            signals=signals,
            state=sequence.state(entry.index),
            row=sequence.note(entry.index, entry.scope),
            memory=self.attachment.remember(entry.index),
        )
        self.attachment.bind_user(view, signals)
        return view

    @staticmethod
    def _signal(run: Pass, need: Need, taps: TowerTaps) -> Signal:
        if need.stage is not None:
            return run.sequence.carried.get(f"{need.name}@{need.layer}", (None, None))[0]
        if need.name not in TOWER_SIGNALS:
            return None  # the user's; bound when the view exists
        return lambda: tower_signal(need.name, taps)

    # ------------------------------------------------------------------ tokens of methods
    def insert(self, run: Pass, entry: Entry, record: LayerRecord, x: Tensor, taps: TowerTaps) -> Tensor:
        """Asks a method for tokens and puts them at the end of the row; gradients flow.

        Args:
            run: the pass.
            entry: the method at its site.
            record: of the layer, which takes the tokens down.
            x: `[B, L, C]`, the row in front of the block.
            taps: what signals are derived from.
        """
        sequence = run.sequence
        taps.inserted = sequence.outputs.get(entry.index)
        tokens = entry.method.insert(self._view(run, entry, taps))
        if tokens is None or tokens.shape[1] == 0:
            return x
        before = sequence.row.length
        sequence.insert(tokens.shape[1])
        record.taps.setdefault("owners", []).append((entry.index, tokens.shape[1]))
        tokens = tokens.to(x.dtype)
        record.start.append(tokens)
        record.inserted += tokens.shape[1]
        if not torch.compiler.is_compiling():
            event = Event(self.stage, entry.site.layer, "start", entry.index, "insert", before, sequence.row.length)
            self.attachment.ledger.visit(run.run, event)
        return torch.cat([x, tokens], 1)

    def take_off(self, run: Pass, record: LayerRecord, out: Tensor) -> Tensor:
        """Inserted tokens leave; their outputs are a signal of the next insert."""
        sequence = run.sequence
        at = sequence.row.prefix + sequence.row.n
        place = at
        for index, count in record.taps.get("owners", ()):
            sequence.outputs[index] = out[:, place : place + count]
            place += count
        sequence.discard()
        return out[:, :at]

    # ------------------------------------------------------------------ signals for later sites
    def carry(self, run: Pass, layer: int, taps: TowerTaps) -> None:
        """Derives what later sites wait for, while q and k of this layer are at hand."""
        for need in self.tapped.get(layer, ()):
            signal = TOWER_SIGNALS[need.name]
            if need.name in OF_OUTPUT:
                continue
            with torch.no_grad():
                run.sequence.carried[f"{need.name}@{layer}"] = (signal.make(taps), signal.axis)

    def carry_outputs(self, run: Pass, layer: int, out: Tensor) -> None:
        """The same for signals of the block's output."""
        sequence = run.sequence
        for need in self.tapped.get(layer, ()):
            if need.name == "protected":
                sequence.carried[f"protected@{layer}"] = (sequence.row.guard(out, 1), None)
            elif need.name == "outputs":
                sequence.carried[f"outputs@{layer}"] = (sequence.row.inner(out.detach(), 1), 1)
