"""Which pass a thread runs in a tower, and which one autograd means when it runs a block again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.threads import BlockOrder, PerThread
from ...errors import PassError
from .tower_pass import LayerRecord, Pass


@dataclass
class ThreadState:
    """What a thread runs in a tower.

    Attributes:
        watch: how far it is.
        current: its last pass.
        trained: its last pass with gradients.
        known: block whose start has just been recognised as one that autograd runs again, or -1.
    """

    watch: BlockOrder
    current: Pass | None = None
    trained: Pass | None = None
    known: int = -1


class RunningPasses:
    """The passes of all threads through one tower.

    Args:
        stage: of the tower, for messages.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.threads = PerThread(lambda: ThreadState(BlockOrder(stage)))
        self.last_trained: Pass | None = None

    @property
    def watch(self) -> BlockOrder:
        """How far this thread is."""
        return self.threads.mine().watch

    @property
    def mine(self) -> Pass | None:
        """The last pass of this thread."""
        return self.threads.mine().current

    @property
    def latest(self) -> Pass | None:
        """The last pass: of this thread, or else of the one that ran last."""
        return self.threads.seen().current

    @property
    def now(self) -> Pass:
        """The pass that this thread runs.

        Raises:
            PassError: none has begun.
        """
        current = self.threads.mine().current
        if current is None:
            raise PassError(
                f"{self.stage}: a block ran without block 0 before it in this thread; a pass starts at block 0"
            )
        return current

    @property
    def trained(self) -> Pass:
        """The pass that autograd runs blocks of again.

        Raises:
            PassError: none ran with gradients.
        """
        # Autograd may run a block again in a thread of its own; `same_forward` tells whether it is this pass.
        trained = self.threads.mine().trained or self.last_trained
        if trained is None:
            raise PassError(f"{self.stage}: autograd runs a block again that never ran with gradients before")
        return trained

    def of(self, again: bool) -> Pass:
        """The pass that a block belongs to; `again` says whether autograd runs it again."""
        return self.trained if again else self.now

    def begin(self, started: Pass) -> None:
        """A pass runs in this thread from now on."""
        running = self.threads.mine()
        running.current = started
        if started.grad:
            running.trained = self.last_trained = started

    def enter(self, layer: int) -> LayerRecord:
        """The record of a block that arrives."""
        if not torch.compiler.is_compiling():
            self.threads.mine().watch.enter(layer)
        return self.now.record(layer)

    def replay(self, layer: int, x: Tensor) -> LayerRecord:
        """The record of a block that autograd runs again, after a look whether it is the same forward."""
        record = self.trained.record(layer)
        same_forward(record.probe, x)
        self.threads.mine().known = layer
        return record

    def recognise(self, record: LayerRecord, layer: int, x: Tensor, again: bool) -> None:
        """The same look for hosts that run only the inside of a block again."""
        running = self.threads.mine()
        if not again:
            record.inner = probe(x) if self.now.grad else None
        elif running.known == layer:
            running.known = -1  # its start has been looked at
        else:
            same_forward(record.inner, x)


def probe(x: Tensor) -> Tensor | None:
    """A few numbers of every row; None in traced code, which no autograd runs again."""
    if torch.jit.is_tracing():
        return None
    return x.detach()[:, -1, :8].clone()


def same_forward(known: Tensor | None, x: Tensor) -> None:
    """Refuses a plan that another forward made.

    Raises:
        PassError: `x` is not what `known` was taken of.
    """
    if known is None:
        return
    now = probe(x)
    if now is None:
        return
    if now.shape != known.shape or not torch.allclose(now.float(), known.float(), 1e-3, 1e-4):
        raise PassError(
            "with gradient checkpointing, backward must follow its own forward: another forward with gradients ran in "
            "between, and its plan cannot be used for this one"
        )
