"""Methods asked without data in models whose tower takes pictures of any size: signals are made stretch by stretch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ..core.ledger import Group
from ..core.model_shape import BlockShape
from ..core.sequence import TowerRow
from ..core.signals import TOWER_SIGNALS, Need, TowerTaps
from ..core.view import Signal
from .meta import empty
from .packed_stretches import Stretches, visits
from .rehearsal import Rehearsal


class PackedRehearsal(Rehearsal):
    """One pass again, through such a tower or the language model behind it."""

    def tower(self) -> None:
        """A pass through the tower."""
        tower = self.shape.packed
        assert tower is not None
        if not self.run.grids:
            self.notes.append("what signals of the vision tower cost is not counted: its pictures' sizes are not known")
            return
        row, tapped = Stretches(tower, self.run.grids), self.attachment.tapped("vision")
        for layer, span in enumerate(tower.spans):
            # Where one row has a mask of blocks, signals are made picture by picture all the same.
            block, lengths = tower.blocks[layer], row.lengths("picture" if span == "row" else span)
            for need in tapped.get(layer, []):
                self.spent(partial(_make, block, lengths, need.name, tower.extra))
            for event in visits(self.run, layer):
                made: set[str] = set()
                for group in event.groups:
                    self.ask(event, group, block.width, partial(self._cut_out, block, lengths, group, made))
                row.cut(event.groups)

    def _cut_out(
        self, block: BlockShape, lengths: Mapping[int, int], group: Group, made: set[str], need: Need
    ) -> Signal:
        """The signal of a group, which is cut out of what was made once of the whole row."""
        if need.stage is not None:
            return self.brought(need, group)
        if need.name not in TOWER_SIGNALS:
            return None

        def signal() -> Tensor | None:
            if need.name not in made:
                made.add(need.name)
                self.spent(partial(_make, block, lengths, need.name))
            return self.apart(need.name, _taps(block, group.rows, group.n))

        return signal

    def brought(self, need: Need, group: Group) -> Signal:
        """As that of a tower whose rows are pictures."""
        tower = self.shape.packed
        if tower is None or need.name not in TOWER_SIGNALS:
            return None
        taps = _taps(tower.blocks[need.layer or 0], group.rows, group.n, tower.extra)
        return lambda: self.apart(need.name, taps)


def _make(block: BlockShape, lengths: Mapping[int, int], name: str, extra: int = 0) -> None:
    """Makes a signal of all stretches whose tokens see each other; of equal ones together."""
    for n, count in lengths.items():
        TOWER_SIGNALS[name].make(_taps(block, count, n, extra))


def _taps(block: BlockShape, rows: int, n: int, extra: int = 0) -> TowerTaps:
    """Taps of stretches of equal length, which show their q and k."""

    def heads(count: int) -> Tensor:
        return empty(rows, count, n + extra, block.head_width)

    tokens = empty(rows, n + extra, block.width)
    return TowerTaps(TowerRow(extra, n), tokens, lambda: heads(block.heads), lambda: heads(block.kv_heads), 1.0)
