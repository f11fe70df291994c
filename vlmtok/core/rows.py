"""The rows of a language model during one forward: which columns are pictures, and how a cut moves everything along.

A row holds text and pictures, perhaps padding. Methods see pictures only, one view row per picture, part or sample;
rows with equal counts form one batched view. A cut puts the slots of each picture in its place, drops padding with the
rest, and aligns rows to the right, since hosts read the last column.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cutting, grouping
from .pictures import TEXT, Picture
from .reduction import Reduction
from .row_data import ColumnMap, Group, PromptRowData, Snapshot


@dataclass(eq=False)
class PromptRows(PromptRowData):
    """The rows as they are now; `PromptRowData` says what is known of them."""

    def enter(self, hold: bool = False) -> None:
        """A stage begins: what is here now is what entered.

        Args:
            hold: a visual token that ends its row is held back from now on.
        """
        grouping.enter(self, hold)

    def count(self, picture: Picture) -> int:
        """Tokens that a picture has now; asks the device once where the host does not know."""
        return grouping.count(self, picture)

    def groups(self, scope: str, by_text: bool = False, by_length: bool = False) -> list[Group]:
        """The view rows of a scope, grouped by equal counts.

        Args:
            scope: ``picture``, ``part`` or ``sample``.
            by_text: rows of a group have equal T.
            by_length: and equal L.

        Returns:
            Groups in a fixed order; view rows without tokens are left out.
        """
        return grouping.groups(self, scope, by_text, by_length)

    def separators(self, of: Collection[tuple[int, int]]) -> list[Group]:
        """The separators of some pictures, see `grouping.separators`."""
        return grouping.separators(self, of)

    def of_pictures(self, group: Group) -> Tensor:
        """Place of each view row's (first) picture among `pictures`, int64 `[G]`."""
        at = [
            next(i for i, p in enumerate(self.pictures) if p.row == row and index in (-1, p.index))
            for row, index, _ in group.units
        ]
        return torch.tensor(at, device=self.label.device)

    def text_columns(self, group: Group) -> Tensor:
        """Columns of the text behind the view's first token, int64 `[G, T]`."""
        label = self.label[group.index]
        column = torch.arange(self.length, device=label.device)
        found = torch.where(label == TEXT, column, -1).sort(1).values
        return found[:, self.length - group.text :]

    def valid_columns(self, group: Group) -> Tensor | None:
        """Columns of the group's rows without padding, int64 `[G, L]`; None where no row is padded."""
        if self.valid is None:
            return None
        column = torch.arange(self.length, device=self.valid.device)
        found = torch.where(self.valid[group.index], column, self.length).sort(1).values
        return found[:, : group.length]

    def relative(self, group: Group, columns: Tensor) -> Tensor:
        """Columns of the padded rows as places in rows without padding."""
        if self.valid is None:
            return columns
        rank = self.valid[group.index].to(torch.int64).cumsum(1) - 1
        return rank.gather(1, columns)

    def gather(self, table: Tensor, group: Group) -> Tensor:
        """`[B, L, ...]` at a group's tokens: `[G, N, ...]`."""
        return table[group.index[:, None], group.columns]

    def cut(self, x: Tensor, pieces: list[tuple[Group, Reduction]], renumber: bool) -> tuple[Tensor, ColumnMap]:
        """Shortens the rows, the only place that does.

        Args:
            x: `[B, L, C]`.
            pieces: reductions of disjoint groups.
            renumber: position ids of every row that loses tokens here become contiguous; else, and in the other rows,
                each slot keeps that of the token that represents it.

        Returns:
            The shorter rows, right-aligned, and where their columns came from.
        """
        return cutting.cut(self, x, pieces, renumber)

    def append(self, count: int) -> None:
        """Books tokens put at the end of every row; they are read, never cut."""
        cutting.append(self, count)

    def discard(self, count: int) -> None:
        """Books that the tokens of the last `append` are gone."""
        cutting.discard(self, count)

    def snapshot(self) -> Snapshot:
        """Where the columns stand now."""
        return Snapshot(self.length, self.place, self.valid, self.owner)

    def restore(self, hidden: Tensor, columns: int) -> Tensor:
        """`Snapshot.restore` of the rows as they are."""
        return self.snapshot().restore(hidden, columns)
