"""From the tower to the language model: the projector's hooks, and what travels with a picture's tokens.

Hosts want as many features as placeholders. What the tower and the ``features`` stage leave of a picture goes through
the projector alone; then it fills the picture's first placeholders in slot order, and the language model's boundary
drops the rest. The record outlives the call: `generate` encodes pictures before its loop, and calls without a cache
show them again at each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment, Entry
from ...core.hooks import replaying
from ...core.ledger import Event, Group, StageRun
from ...core.rows import Picture, PromptRows
from ...core.sequence import Sequence, TowerRow
from ...core.signals import Need
from ...core.threads import PerThread
from ...core.view import Signal, TokenView
from ...errors import CacheError, PassError
from .. import host_objects, hosts
from ..base import child
from ..hosts import Arguments
from ..towers.packed_pass import PackedPass
from ..towers.tower import Tower
from .gathering import gathered
from .handover import Handover, number_pictures
from .packing import PROBE, Packing
from .parts import square
from .patches import fits, in_order, packed_means, token_means
from .signal_queue import SignalQueue, probe_of
from .spans import IMAGE
from .spec import VLMSpec

UNSEEN = (
    "the projector was called without a pass of the tower before it: what the tower left of the last pictures has been "
    "handed over already; encode pictures with the model's get_image_features"
)
_LATE = (
    "the features that are projected are not those that the tower made last: features of an earlier call cannot be "
    "combined with methods that read the tower's attention here; encode and ask in one call"
)
ALIKE = 2e-3
"""How far features may lie from those that are known, as a share of their norm: what half precision rounds away."""


@dataclass
class ProjectorRun:
    """What a thread's calls of the projector left.

    Attributes:
        handover: what the last one passed on, or None.
        pending: of the call that runs: what travels with its tokens, and which are real.
        shape: pictures and placeholders of the last one.
    """

    handover: Handover | None = None
    pending: tuple[Sequence, Tensor | None] | None = None
    shape: tuple[int, int] | None = None


class Projector:
    """Hooks on the module that maps tower features to the text width."""

    def __init__(self, attachment: Attachment, spec: VLMSpec, tower: Tower | None) -> None:
        self.attachment = attachment
        self.spec = spec
        self.tower = tower
        self.entries = attachment.at("features")
        self.running = PerThread(ProjectorRun)
        self.packing: Packing | None = None
        self.queue = SignalQueue() if spec.patches is not None and tower is not None else None

    @property
    def handover(self) -> Handover | None:
        """What the last call passed on: in this thread, or else in the one that ran last."""
        return self.running.seen().handover

    def install(self, core: nn.Module) -> None:
        """Places the hooks."""
        if self.spec.packing_methods is not None:
            self.packing = Packing(self.spec, core)
        if not self.spec.projector:
            return
        module = child(core, self.spec.projector)
        if self.tower is not None and self.queue is None:
            self.arguments = Arguments(module, [hosts.FEATURES])
            self.attachment.hook(module, "pre", self.shorten)
        self.attachment.hook(module, "post", self.fill)
        if self.spec.projects_late and self.queue is not None:
            self.attachment.hook(child(core, self.spec.tower), "post", self.note)

    # ------------------------------------------------------------------ hooks
    def shorten(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Projector pre-hook: methods at ``features``."""
        running = self.running.mine()
        running.pending = None
        if replaying():
            return None
        x = self.arguments.get(hosts.FEATURES, args, kwargs)
        current = None if self.tower is None else self.tower.running.mine
        if current is None or x.dim() != 3:
            return None
        if current.handed:
            raise PassError(UNSEEN)
        current.handed = True
        sequence = current.sequence
        if x.shape[:2] != (current.run.rows, sequence.row.n):
            raise PassError(
                f"the projector got {list(x.shape[:2])} tokens where the tower left "
                f"[{current.run.rows}, {sequence.row.n}]: the feature layer of this call is not the configured one"
            )
        valid: Tensor | None = None
        before = x
        for entry in self.entries:
            x, valid = self._visit(entry, sequence, current.run, x, valid)
        running.pending = (sequence, valid)
        if x is before:
            return None
        return self.arguments.put(args, kwargs, {hosts.FEATURES: x})

    def fill(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Projector hook: features take the picture's first placeholders, zeros fill the rest."""
        if replaying() or not isinstance(output, Tensor):
            return None
        if self.queue is not None:
            self._wait(module, hosts.first_tensor(module, args, kwargs), output, self.queue)
        if output.dim() != 3:
            return None
        running = self.running.mine()
        pending, running.pending = running.pending, None
        running.shape = (output.shape[0], output.shape[1])
        running.handover = None
        if pending is None:
            return None
        sequence, valid = pending
        if self.packing is not None:
            self.packing.record(output, sequence.carried)
            return None
        entered, slots = sequence.entered, output.shape[1]
        running.shape = (output.shape[0], entered)
        if slots > entered:
            raise PassError(f"{slots} features do not fit into the {entered} placeholders of a picture")
        carried = {name: (value, axis) for name, (value, axis) in sequence.carried.items() if value is not None}
        room = output.new_zeros(output.shape[0], entered - slots, output.shape[2])
        whole = output if slots == entered else torch.cat([output, room], 1)
        probe = whole[..., :PROBE].detach().clone()
        running.handover = Handover(output.shape[0], entered, slots, valid, sequence.view_size(), carried, probe)
        return None if whole is output else whole

    def note(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook on the tower: what it gave, where another call projects it."""
        current = None if self.tower is None or replaying() else self.tower.running.mine
        if isinstance(current, PackedPass):
            current.gave = probe_of(host_objects.hidden_of(module, output))

    def _wait(self, module: nn.Module, given: Tensor, output: Tensor, queue: SignalQueue) -> None:
        """Signals of the tower's patches wait as those of the tokens `[B, ..., C]` that the projector made of them."""
        assert self.tower is not None and self.spec.patches is not None
        current = self.tower.running.mine
        if self.spec.projects_late and isinstance(current, PackedPass):
            if current.gave is None or not _alike(current.gave, probe_of(given)):
                raise CacheError(_LATE)
            if current.handed:
                return  # a step without a cache shows the same again
        if current is None or current.handed:
            raise PassError(UNSEEN)
        if isinstance(current, PackedPass):
            self._wait_packed(module, output, queue, current)
            return
        current.handed = True
        output = output.flatten(1, -2)
        row, n = current.sequence.row, output.shape[1]
        grid = current.grid or square(row.n)
        if output.shape[0] != current.run.rows or grid is None or not fits(grid, n):
            raise hosts.changed(
                module,
                f"it made {list(output.shape[:2])} tokens of [{current.run.rows}, {row.n}] patches, which squares of "
                "them do not give",
            )
        waiting = {
            name: (token_means(self.spec.patches, value, axis, grid, n), axis)
            for name, (value, axis) in current.sequence.carried.items()
            if value is not None and axis is not None
        }
        queue.record(output, waiting)

    def _wait_packed(self, module: nn.Module, output: Tensor, queue: SignalQueue, current: PackedPass) -> None:
        """The same of a row of all pictures, whose tokens come in one run `[T, C]`, perhaps window by window."""
        assert self.tower is not None and self.tower.packed is not None and self.spec.patches is not None
        merge = self.tower.packed.merge
        whole = gathered(module, output, current, merge)
        if whole is None:
            return
        current.handed, output = True, whole
        waiting = {
            name: (
                packed_means(self.spec.patches, value, axis, current.grids, merge, current.order, current.real),
                axis,
            )
            for name, (value, axis) in current.sequence.carried.items()
            if value is not None and axis is not None
        }
        # A projector behind the tower gets its tokens in order; one inside joins them window by window.
        inside = self.spec.projector.startswith(f"{self.spec.tower}.")
        order = current.order if inside else None
        queue.record(output if order is None else in_order(output, order), waiting)

    def carry(self, rows: PromptRows, x: Tensor, encoded: Mapping[int, int]) -> None:
        """Sets signals that were packed or wait beside the columns of the language model's input.

        Args:
            rows: as they arrive.
            x: `[B, L, C]`, their embeddings.
            encoded: by code, how many pictures the host encoded.
        """
        if self.packing is not None:
            self.packing.carry(rows, x, encoded)
        if self.queue is not None:
            self.queue.carry(rows, x)

    def forget(self) -> None:
        """Pictures are about to be encoded: what waited belongs to others."""
        for calls in (self.packing, self.queue):
            if calls is not None:
                calls.calls.clear()

    def waits(self) -> bool:
        """Whether something of the tower waits for the placeholders of this thread's prompt."""
        waiting = self.packing or self.queue
        if waiting is not None:
            return any(call.signals for call in waiting.calls)
        handover = self.running.mine().handover
        if handover is None:
            return False
        cut = handover.slots < handover.entered or handover.valid is not None
        return cut or bool(handover.carried) or handover.size is not None

    def made(self, features: Any) -> Tensor | None:
        """Whether features are those that the last call in this thread gave, bool `[]`; None where it does not matter.

        Args:
            features: of pictures, `[N, C]` each, as they came with a prompt.
        """
        if self.tower is None or self.packing is not None or self.queue is not None:
            return None  # what waits is held against the tokens that arrive
        handover, parts = self.running.mine().handover, list({id(part): part for part in features}.values())
        if handover is None or handover.probe is None or not parts:
            return torch.zeros((), dtype=torch.bool)
        known = handover.probe
        if any(part.shape != (known.shape[1], part.shape[-1]) for part in parts):
            return torch.zeros((), dtype=torch.bool, device=known.device)
        shown = torch.stack([part[:, :PROBE].detach() for part in parts]).to(known.device)
        same = (shown[:, None] == known.to(shown.dtype)).flatten(2).all(-1)
        # Hosts may scale features and give them another dtype, alike for all tokens.
        apart = (_unit(shown)[:, None] - _unit(known)).flatten(2).norm(dim=-1)
        return (same | (apart <= ALIKE)).any(1).all()

    def _visit(
        self, entry: Entry, sequence: Sequence, run: StageRun, x: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if valid is not None:
            raise PassError(f"{type(entry.method).__name__} cannot act at features behind a ragged reduction")
        last = self.tower.last if self.tower is not None else 0
        protected = sequence.carried.get(f"protected@{last}", (None, None))[0]
        signals: dict[str, Signal] = {need.key: self._signal(need, sequence, protected) for need in entry.needs}
        view = TokenView(
            x.detach(),
            entry.site,
            size=sequence.view_size(),
            entered=sequence.entered,
            grid=None if self.tower is None or self.tower.current is None else self.tower.current.grid,
            signals=signals,
            state=sequence.state(entry.index),
            row=sequence.note(entry.index, entry.scope),
            memory=self.attachment.remember(entry.index),
        )
        self.attachment.bind_user(view, signals)
        reduction = self.attachment.decide(entry, view)
        before = sequence.row.n
        if reduction is not None:
            size = sequence.view_size()
            x, sizes = reduction.apply(x, size, protected)
            sequence.row = TowerRow(0, before)
            sequence.book(reduction, spare=0 if protected is None else protected.shape[1])
            sequence.resize(sizes if size is not None or reduction.merges else None)
            valid = reduction.valid
            current = None if self.tower is None else self.tower.running.mine
            if sequence.source is not None and current is not None:
                current.steps.append((entry.site, sequence.source, entry.method))
        if not torch.compiler.is_compiling():
            group = Group(x.shape[0], before, sequence.row.n, sequence.entered)
            event = Event(
                "features",
                None,
                "end",
                entry.index,
                "observe" if reduction is None else "cut",
                before,
                sequence.row.n,
                (group,),
                valid is not None,
            )
            self.attachment.ledger.visit(run, event)
        return x, valid

    @staticmethod
    def _signal(need: Need, sequence: Sequence, protected: Tensor | None) -> Signal:
        if need.stage is None:
            return protected if need.name == "protected" else None
        return sequence.carried.get(f"{need.name}@{need.layer}", (None, None))[0]

    # ------------------------------------------------------------------ towards the language model
    def number(self, pictures: list[Picture]) -> None:
        """Says which picture of the tower each one is."""
        number_pictures(pictures, self.running.mine().handover)

    def lengths(self, lengths: dict[int, list[int]] | None, total: int) -> dict[int, list[int]] | None:
        """Tokens of each picture, in the order of the placeholders; None where only their runs tell."""
        # One row of the projector's output is one picture, whatever pieces hosts cut them into.
        shape = self.running.mine().shape
        size = shape[1] if self.spec.parts == "one" and shape is not None else 0
        if lengths is not None and sum(map(sum, lengths.values())) == total:
            if not size or all(n == size for n in lengths.get(IMAGE, ())):
                return lengths
            if total % size:
                raise CacheError(
                    f"this call holds {total} placeholders of pictures with {size} each; a prefill in chunks that "
                    "splits a picture cannot be combined with a compression"
                )
        if size and total % size == 0:
            return {IMAGE: [size] * (total // size)}
        if self.spec.parts == "rows":  # their runs tell rows, not pictures
            raise CacheError(
                f"this call holds {total} placeholders, and the encoder's pictures {lengths}; a prefill in chunks that "
                "splits a picture cannot be combined with a compression"
            )
        return None


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether tokens are the same."""
    return one.shape == other.shape and bool((one == other.to(one.device)).all())


def _unit(x: Tensor) -> Tensor:
    """`[P, N, c]` with one as the norm of each picture."""
    x = x.float()
    return x / x.flatten(1).norm(dim=-1).clamp(min=1e-12)[:, None, None]
