"""q, k and biases of a tower's blocks: of the block that runs, caught by hooks, or of one that has not run yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...core.hooks import replaying
from ...core.signals import TowerTaps
from ...core.threads import PerThread
from ..base import BlockSpec, child
from .running import RunningPasses
from .tower_pass import LayerRecord, Pass


@dataclass
class Mute:
    """Whether a thread's hooks look away."""

    on: bool = False


class BlockTaps:
    """Makes the taps that signals are derived from.

    Args:
        block: where its blocks can be tapped.
        running: the passes through the tower.
        classed: whether the first protected token is a class token.
        rows: what a host's module works on, as rows.
    """

    def __init__(
        self,
        block: BlockSpec,
        running: RunningPasses,
        classed: bool = True,
        rows: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.block = block
        self.rows = rows
        self.classed = classed
        self.running = running
        self._mute = PerThread(Mute)

    @property
    def muted(self) -> bool:
        """Whether modules of a block run on behalf of this thread, so that hooks on them look away."""
        return self._mute.mine().on

    @muted.setter
    def muted(self, on: bool) -> None:
        self._mute.mine().on = on

    def tap_q(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Hook behind what gives q."""
        if not self.muted and not replaying():
            self.running.now.record(layer).taps["q"] = output

    def tap_k(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Hook behind what gives k."""
        if not self.muted and not replaying():
            self.running.now.record(layer).taps["k"] = output

    def inside(self, run: Pass, record: LayerRecord, x: Tensor, bias: Tensor | None) -> TowerTaps:
        """Taps of the block that runs now.

        Args:
            run: the pass.
            record: of the block; its taps hold what hooks caught.
            x: `[B, L, C]`, the row that the method is shown.
            bias: what was added to the logits.
        """
        caught = record.taps
        attn = caught["attn"]
        heads = attrgetter(self.block.heads)(attn)

        def made(which: str) -> Tensor:
            if which not in caught:
                with _as_called(run, x):
                    return self.block.project(attn, caught["x"], which, {})
            if caught[which].dim() == 4:  # made before, or by the host
                return caught[which]
            given = self.rows(caught[which])
            caught[which] = _by_head(given, heads) if self.block.split is None else self.block.split(attn, given, which)
            return caught[which]

        return TowerTaps(
            caught.get("row", run.sequence.row),
            x,
            lambda: made("q"),
            lambda: made("k"),
            self.block.scale(attn),
            bias,
            self._rotate(attn, caught.get("rope")),
            left=run.sequence.row,
            cuts=caught.get("cuts", ()),
            visible=caught.get("visible"),
            classed=self.classed,
        )

    def ahead(self, run: Pass, module: nn.Module, x: Tensor, bias: Tensor | None, table: Tensor | None) -> TowerTaps:
        """Taps of a block that has not run yet, from its own norm and projections.

        Args:
            run: the pass.
            module: the block.
            x: `[B, L, C]`, its input.
            bias: what it will add to the logits.
            table: the rotary table that the host gives it, or None; it is brought to the tokens that are left.
        """
        attn = child(module, self.block.attn)
        shared: dict[str, Tensor] = {}

        def made(which: str) -> Tensor:
            self.muted = True
            try:
                with _as_called(run, x):
                    if "normed" not in shared:
                        shared["normed"] = child(module, self.block.norm)(x)
                    return self.block.project(attn, shared["normed"], which, shared)
            finally:
                self.muted = False

        if table is not None:
            moved = run.rotary(table, x.shape[0])
            table = table if moved is None else moved
        rotate = self._rotate(attn, table)
        return TowerTaps(
            run.sequence.row,
            x,
            lambda: made("q"),
            lambda: made("k"),
            self.block.scale(attn),
            bias,
            rotate,
            visible=run.shown(),
            classed=self.classed,
        )

    def _rotate(self, attn: nn.Module, table: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        if table is None or self.block.rotate is None:
            return None
        return self.block.rotate(attn, table)


@contextmanager
def _as_called(run: Pass, x: Tensor) -> Iterator[None]:
    """Projections computed again run under the caller's autocast, which selection turns off around them."""
    with torch.no_grad(), nullcontext() if run.autocast is None else torch.autocast(x.device.type, dtype=run.autocast):
        yield


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[B, L, H d]` to `[B, H, L, d]`; what has four dimensions already stays."""
    if x.dim() == 4:
        return x
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
