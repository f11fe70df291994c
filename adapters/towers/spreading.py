"""The whole grid again behind a tower's last block, for readers that want a feature for each patch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.ledger import Event, Ledger
from .tower_pass import Pass


def spread(run: Pass, out: Tensor, num_prefix: int) -> Tensor:
    """Every patch gets its slot's features, zeros where it was dropped.

    Args:
        run: the pass.
        out: `[B, L, C]`, output of the last block.
        num_prefix: protected tokens in front.

    Returns:
        `[B, prefix + patches, C]`.
    """
    whole = spread_out(out[:, num_prefix:], run.sequence.source, 1)
    return torch.cat([out[:, :num_prefix], whole], 1)


def book_spread(run: Pass, stage: str, layer: int, ledger: Ledger) -> None:
    """The row is whole again: signals on their way get an entry for each patch too.

    Args:
        run: the pass.
        stage: of the tower.
        layer: its last block.
        ledger: the books.
    """
    sequence = run.sequence
    before = sequence.row.length
    carried = {
        name: (spread_out(value, sequence.source, axis), axis)
        for name, (value, axis) in sequence.carried.items()
        if value is not None and axis is not None
    }
    sequence.restore()
    sequence.carried.update(carried)
    if not torch.compiler.is_compiling():
        ledger.visit(run.run, Event(stage, layer, "end", -1, "spread", before, sequence.row.length))


def spread_out(value: Tensor, source: Tensor, axis: int) -> Tensor:
    """Rows or a signal of slots as those of patches: every patch has that of its slot, 0 where it was dropped."""
    shape = [1] * value.dim()
    shape[0], shape[axis] = source.shape
    index = source.reshape(shape).expand(*value.shape[:axis], source.shape[1], *value.shape[axis + 1 :])
    return value.gather(axis, index.clamp(min=0)) * (index >= 0).to(value.dtype)
