"""What one forward through a tower carries and decides, so that autograd can run its blocks again in the same way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.ledger import StageRun
from ...core.method import Method
from ...core.site import Site


@dataclass
class LayerRecord:
    """What a pass decided in one layer; a block that autograd runs again follows it.

    Attributes:
        bias: what proportional attention adds to the logits, or None.
        shown: bool `[B, L]`, keys that the block's own mask must show in place of the host's, or None.
        moved: whether the row is no longer the host's, so that its mask does not fit.
        rope: the rotary table that the block got, or None.
        bounds: the boundaries that the block was told in place of the host's, or None.
        place: patches that its tokens represent, or None where it has all.
        chunks: `bias` at each stretch of rows that its attention is called for, in order, or None where there is none.
        asked: how many of them the attention has been given.
        inserted: how many tokens were put at the end of the row.
        start: tokens put in and steps taken before the block, in order.
        mid: steps between attention and MLP.
        end: steps after the block.
        probe: a few numbers of the block's input, to know it again, and
        inner: of its attention's input, which is all that some hosts run again.
        taps: what hooks caught of this block; emptied when it ends.
        branch: output of the MLP branch.
        merged: M x1.
        full: x1.
    """

    bias: Tensor | None = None
    shown: Tensor | None = None
    moved: bool = False
    rope: Any = None
    bounds: Tensor | None = None
    place: Tensor | None = None
    chunks: tuple[Tensor, ...] | None = None
    asked: int = 0
    inserted: int = 0
    start: list[Any] = field(default_factory=list)
    mid: list[Any] = field(default_factory=list)
    end: list[Any] = field(default_factory=list)
    probe: Tensor | None = None
    inner: Tensor | None = None
    taps: dict[str, Any] = field(default_factory=dict)
    branch: Tensor | None = None
    merged: Tensor | None = None
    full: Tensor | None = None


@dataclass
class Pass:
    """One forward through a tower.

    Attributes:
        sequence: what travels with the tokens.
        run: the books.
        records: what was decided, by layer.
        steps: sources after each cut and whose it was, for traces.
        tables: rotary tables of the rows as they are, with the table each was made from.
        grid: rows and columns of the patches that entered, or None where they form none.
        grad: whether gradients were on.
        autocast: dtype of the caller's autocast, or None.
        handed: whether a projector has taken what it left.
        visible: bool `[B, L0]`, tokens of the row that entered which the host's mask shows, or None where it shows all.
    """

    sequence: Any
    run: StageRun
    records: dict[int, LayerRecord] = field(default_factory=dict)
    steps: list[tuple[Site, Tensor, Method]] = field(default_factory=list)
    tables: dict[tuple[int, int], tuple[Any, Any]] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    grad: bool = False
    autocast: torch.dtype | None = None
    handed: bool = False
    visible: Tensor | None = None

    def record(self, layer: int) -> LayerRecord:
        """The record of a layer."""
        if layer not in self.records:
            self.records[layer] = LayerRecord()
        return self.records[layer]

    def shown(self) -> Tensor | None:
        """Which tokens of the row as it is now the host shows to others, bool `[B, L]`; None where it shows all.

        A slot is shown or hidden like the token that represents it; inserted tokens are shown.
        """
        if self.visible is None:
            return None
        row, place = self.sequence.row, self.sequence.place
        front, patches = self.visible[:, : row.prefix], self.visible[:, row.prefix :]
        patches = patches if place is None else patches.gather(1, place)
        behind = patches.new_ones(patches.shape[0], row.inserted)
        return torch.cat([front, patches, behind], 1)

    def rotary(self, table: Tensor, batch: int) -> Tensor | None:
        """The rotary table of the tokens that are left: a slot keeps the rotation of the token that represents it.

        Args:
            table: (sin, cos) halves, `[N0, D]`, `[H, N0, D]` or with a batch in front.
            batch: rows.

        Returns:
            The table with the rows of the tokens that are left; inserted tokens get the identity rotation. None where
            nothing moved.
        """
        place, inserted = self.sequence.place, self.sequence.row.inserted
        if place is None and not inserted:
            return None
        key = (id(table), self.sequence.cuts * 64 + inserted)
        if key in self.tables:
            return self.tables[key][1]
        rows = table
        if rows.dim() == 2:
            rows = rows[None, None]
        elif rows.dim() == 3:
            rows = rows.unsqueeze(0 if rows.shape[0] != batch or batch == 1 else 1)
        if place is not None:
            index = place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1])
            rows = rows.expand(batch, -1, -1, -1).gather(2, index)
        if inserted:
            half = rows.shape[-1] // 2
            still = torch.cat([rows.new_zeros(half), rows.new_ones(rows.shape[-1] - half)])
            rows = torch.cat([rows, still.expand(*rows.shape[:2], inserted, -1)], 2)
        self.tables[key] = (table, rows)  # the table is held, so that its id is not given out again
        return rows


def hiding(bias: Tensor | None, shown: Tensor, host: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mask of a block whose row got shorter: what proportional attention adds, and nothing of hidden keys.

    Args:
        bias: `[B, 1, 1, L]`, or None.
        shown: bool `[B, L]`.
        host: the mask that the host gave, whose form is kept where it is one number a token.
        dtype: of the rows.
    """
    if host is not None and host.dim() == 2:
        return shown.to(host.dtype)
    start = torch.zeros_like(shown[:, None, None], dtype=dtype) if bias is None else bias
    return start.masked_fill(~shown[:, None, None], torch.finfo(dtype).min)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast around us, or None."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
