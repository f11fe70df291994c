"""State of the pass that runs, one for each thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ..errors import PassError

S = TypeVar("S")


class PerThread(Generic[S]):
    """State of the pass that runs, one for each thread: several threads may call one compressed model.

    Args:
        make: a fresh state.

    Attributes:
        latest: the state of the thread that ran last, for who asks from outside.
        traced: the state of compiled code.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make
        self._local = threading.local()
        self.traced = make()
        self.latest = self.traced

    def mine(self) -> S:
        """The state of this thread."""
        if torch.compiler.is_compiling():
            return self.traced  # what is traced runs no hook again
        found: S | None = getattr(self._local, "state", None)
        if found is None:
            found = self._local.state = self._make()
        self.latest = found
        return found

    def seen(self) -> S:
        """The state of this thread if it ran anything, else of the one that ran last."""
        found: S | None = getattr(self._local, "state", None)
        return self.latest if found is None else found


class BlockOrder:
    """How far a pass is in the thread that runs it; a block out of turn raises."""

    __slots__ = ("at", "begun", "stage")

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.begun = False
        self.at = -1

    def begin(self) -> None:
        """A pass starts at block 0."""
        self.begun = True
        self.at = -1

    def enter(self, layer: int) -> None:
        """A block arrives.

        Raises:
            PassError: before block 0 ran in this thread, or not behind the block before.
        """
        if not self.begun:
            raise PassError(
                f"{self.stage} block {layer} ran without block 0 before it in this thread; a pass of a compressed "
                "model starts at block 0 and stays in its thread"
            )
        if layer <= self.at:
            raise PassError(
                f"{self.stage} block {layer} arrived behind block {self.at} of the same pass; blocks run in order"
            )
        self.at = layer
