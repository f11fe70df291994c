"""The rows of a language model as data: what is known of each column, view rows, and what a cut did to columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .pictures import Picture


@dataclass(eq=False)
class Group:
    """View rows of equal counts.

    Attributes:
        units: (row, picture or -1, part or -1) of each view row.
        index: int64 `[G]`, LM row of each.
        columns: int64 `[G, N]`, column of each token in the padded row.
        n: N.
        text: T, text columns behind the view's first token.
        length: L, valid columns of the row.
        mixed: whether some of that text stands before some of the view's tokens.
        entered: tokens of a view row when it entered the stage.
        grid: rows and columns of patches of each view row, or None.
        frames: frames of a clip that each view row is; 0 where it is none.
        cells: tokens of each of these frames while they are whole; else 0.
    """

    units: list[tuple[int, int, int]]
    index: Tensor
    columns: Tensor
    n: int
    text: int
    length: int
    mixed: bool
    entered: int
    grid: tuple[int, int] | None
    frames: int = 0
    cells: int = 0

    def only(self, rows: Sequence[int]) -> Group:
        """Some of the view rows."""
        if len(rows) == len(self.units):
            return self
        at = torch.tensor(rows, device=self.index.device)
        return replace(self, units=[self.units[row] for row in rows], index=self.index[at], columns=self.columns[at])


@dataclass(frozen=True, eq=False)
class ColumnMap:
    """What a cut did to columns.

    Attributes:
        place: int64 `[B, L']`, column whose place each new column takes.
        source: int64 `[B, L']`, column whose token it is.
        valid: bool `[B, L']`, or None where no row is padded.
        dropped: int64 `[B]`, valid columns that left each row.
    """

    place: Tensor
    source: Tensor
    valid: Tensor | None
    dropped: Tensor


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Where the columns of some rows stood in the prompt.

    Attributes:
        length: L.
        place: int64 `[B, L]`, original column of each column.
        valid: bool `[B, L]`, or None where no row is padded.
        owner: int64 `[B, S]`, column that owns each original column (-1 dropped); kept only for traces.
    """

    length: int
    place: Tensor
    valid: Tensor | None
    owner: Tensor | None = None

    def restore(self, hidden: Tensor, columns: int) -> Tensor:
        """Puts rows back to their original length; a dropped column repeats the last one kept before it.

        So the prediction of the token behind a picture stays the one that the shortened row makes.

        Args:
            hidden: `[B, L, C]`.
            columns: S, the original length.

        Returns:
            `[B, S, C]`.
        """
        rank = torch.arange(self.length, device=hidden.device).expand_as(self.place)
        target = self.place if self.valid is None else torch.where(self.valid, self.place, columns)
        table = torch.full((self.place.shape[0], columns + 1), -1, device=hidden.device).scatter(1, target, rank)
        latest = table[:, :columns].cummax(1).values
        first = 0 if self.valid is None else self.valid.to(torch.int64).argmax(1, keepdim=True)
        latest = torch.where(latest < 0, first, latest)
        return hidden.gather(1, latest.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


@dataclass(eq=False)
class PromptRowData:
    """What `PromptRows` holds.

    Attributes:
        batch: B.
        length: columns, padding included.
        lengths: valid columns of each row.
        pictures: all pictures, by row.
        label: int64 `[B, L]`, picture of each column, or TEXT, PAD, HELD.
        part: int64 `[B, L]`, or None for all 0.
        valid: bool `[B, L]`, or None where no row is padded.
        place: int64 `[B, L]`, original column of each column.
        positions: int64 `[..., B, L]`, position ids.
        size: fp32 `[B, L]`, or None while all are 1.
        states: `[B, L, ...]` by (method, name).
        known: for which view rows a state was written.
        notes: per (method, scope), name and view row.
        carried: signals on their way, `[B, L, ...]` with the axis that the tokens have in a view, or one entry for
            each picture (axis None).
        first_part: int64 `[B, S]`, `part` as it was at first; kept only for traces.
        owner: int64 `[B, S]`, column that owns each original column (-1 dropped); kept only for traces.
        drafts: last columns that hold drafts of the answer; nobody decides by them.
    """

    batch: int
    length: int
    lengths: list[int]
    pictures: list[Picture]
    label: Tensor
    part: Tensor | None
    valid: Tensor | None
    place: Tensor
    positions: Tensor
    size: Tensor | None = None
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    known: dict[tuple[int, str], set[tuple[int, int, int]]] = field(default_factory=dict)
    notes: dict[tuple[int, str], dict[str, dict[tuple[int, int, int], Any]]] = field(default_factory=dict)
    carried: dict[str, tuple[Tensor, int | None]] = field(default_factory=dict)
    first_part: Tensor | None = None
    owner: Tensor | None = None
    drafts: int = 0
