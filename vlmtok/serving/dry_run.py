"""Methods asked on tensors without data, before an engine hears of a spec."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.attachment import Entry
from ..core.sequence import TowerRow
from ..core.signals import TOWER_SIGNALS, Need, TowerTaps
from ..core.site import Layout
from ..core.view import Signal, TokenView
from ..kernels import dispatch
from ..kernels.exact import exact

TEXT = 8
"""Text tokens behind a picture; how many makes no difference to a count."""


def empty(*shape: int) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, device="meta")


class Dry:
    """Shows methods pictures without data.

    Args:
        layout: what the model offers.
        grid: rows and columns of a picture's tokens, or None.
        clip: frames of the clip that it is, and tokens of each; zeros where it is none.
    """

    def __init__(self, layout: Layout, grid: tuple[int, int] | None, clip: tuple[int, int] = (0, 0)) -> None:
        self.layout = layout
        self.grid = grid
        self.frames, self.cells = clip

    def ask(self, entry: Entry, n: int, entered: int) -> int:
        """Slots that a method leaves of a view row.

        Args:
            entry: the method at its site.
            n: tokens that arrive.
            entered: tokens when the row entered the stage.
        """
        stage = self.layout.stages[entry.site.stage]
        tokens = empty(1, n, stage.width)
        given = {need.key: self._signal(need, entry, n) for need in entry.needs}
        view = TokenView(
            tokens, entry.asked, None, stage.num_prefix, stage.depth, self.grid, entered=entered, signals=given,
            memory=self._memory(entry), frames=self.frames, cells=self.cells,
        )  # fmt: skip
        with dispatch.use("torch"), torch.no_grad(), exact(tokens.device):
            reduction = entry.method.reduce(view)
        return n if reduction is None else reduction.slots

    def _signal(self, need: Need, entry: Entry, n: int) -> Signal:
        if need.name == "text":
            return empty(1, TEXT, self.layout.stages["projected"].width)
        if need.name not in TOWER_SIGNALS:
            return None
        tower = self.layout.stages["vision"]
        row = TowerRow(tower.num_prefix, n)
        heads, d = max(tower.heads, 1), max(tower.width // max(tower.heads, 1), 1)
        taps = TowerTaps(
            row,
            empty(1, row.length, tower.width),
            lambda: empty(1, heads, row.length, d),
            lambda: empty(1, heads, row.length, d),
            1.0,
        )
        return lambda: TOWER_SIGNALS[need.name].make(taps)

    def _memory(self, entry: Entry) -> torch.nn.Module | None:
        with torch.device("meta"):
            return entry.method.build(self.layout)
