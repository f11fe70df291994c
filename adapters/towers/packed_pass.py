"""One forward through a packed tower: one row of all pictures, in segments, and what was noted for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...core.reduction import Reduction
from ...core.row_data import Group
from .packed_grids import PatchGrid
from .packed_segments import Segments
from .tower_pass import Pass


@dataclass
class PackedPass(Pass):
    """A pass whose sequence is one row `[1, S]` of all pictures.

    Attributes:
        segments: the row as it is.
        grids: of the pictures.
        order: int64 `[units]`, which unit of ``merge ** 2`` patches lies where; None where they lie in order.
        states: what methods noted of tokens, `[1, S, ...]` by (method, name), and
        known: for which segments.
        real: int64 `[patches]`, places of the patches in rows that are padded, as the rule of the family wants them in
            order; None where all pictures lie in one row.
        gave: first channels of what the tower gave, `[T, c]`, where a projector reads it in a later call, or None.
        tokens: what the projector made of the first pictures, where it sees one at a time.
        inside: the block that runs, and the row as it came into it.
        notes: what they noted of segments, per (method, scope), by name and segment.
    """

    segments: Segments = field(default_factory=lambda: Segments((), 0))
    grids: tuple[PatchGrid, ...] = ()
    order: Tensor | None = None
    real: Tensor | None = None
    gave: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)
    inside: tuple[int, Segments] | None = None
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    known: dict[tuple[int, str], set[tuple[int, int, int]]] = field(default_factory=dict)
    notes: dict[tuple[int, str], dict[str, dict[tuple[int, int, int], Any]]] = field(default_factory=dict)
    batch: int = 1

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return self.segments.total

    def gather(self, table: Tensor, group: Group) -> Tensor:
        """`[1, S, ...]` at a group's tokens: `[b, n, ...]`."""
        return table[0, group.columns]

    def follow(self, reduction: Reduction, lengths: list[int]) -> None:
        """Takes along what methods noted when the row got shorter.

        Args:
            reduction: of the row.
            lengths: tokens of each segment that are left.
        """
        self.segments = self.segments.shortened(lengths)
        self.states = {key: reduction.gather(table) for key, table in self.states.items()}

    def rotary(self, table: Any, batch: int) -> Any:
        """The rotary tables of the tokens that are left: a slot keeps the rotation of the patch that represents it.

        Args:
            table: of the patches, `[L, d]`, several as a tuple.
            batch: 1.
        """
        place = self.sequence.place
        if place is None:
            return None
        parts = table if isinstance(table, tuple) else (table,)
        key = (id(parts[0]), self.sequence.cuts)
        if key not in self.tables:
            moved = tuple(part.index_select(-2, place[0]) for part in parts)
            self.tables[key] = (table, moved if isinstance(table, tuple) else moved[0])  # held, so that its id stays
        return self.tables[key][1]
