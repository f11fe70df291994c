"""Rows of towers that take pictures of any size as counts: stretches that tokens merge in, and their lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.ledger import Event, Group, StageRun
from ..core.model_shape import PackedTowerShape, Tokens
from ..errors import NotCounted


@dataclass(frozen=True)
class Block:
    """One block, all rows of a pass.

    Attributes:
        queries: tokens in attention.
        pairs: of a query and a key that are multiplied.
        mlp: tokens of the MLP.
    """

    queries: int
    pairs: int
    mlp: int


class Stretches:
    """The finest stretches of a pass: windows where there are some, else frames; equal ones stay equally long.

    Args:
        shape: the tower.
        grids: frames, rows and columns of patches of each picture.
    """

    def __init__(self, shape: PackedTowerShape, grids: Iterable[Sequence[int]]) -> None:
        self.shared = shape.shared
        self.pictures = [(frames, _pieces(shape, rows, columns)) for frames, rows, columns in grids]
        self.left = {entered: entered for _, pieces in self.pictures for entered in pieces}

    def _length(self, pieces: Counter[int]) -> int:
        return sum(count * self.left[entered] for entered, count in pieces.items())

    @property
    def total(self) -> int:
        """Tokens of all of them."""
        return sum(frames * self._length(pieces) for frames, pieces in self.pictures)

    def lengths(self, span: str) -> Counter[int]:
        """How many stretches of tokens that see each other there are, by length.

        Args:
            span: see `PackedTowerShape.spans`; of them, a ``row`` that all pictures share is one stretch. ``picture``
                is all of a picture or clip.
        """
        found: Counter[int] = Counter()
        if span == "row" and self.shared:
            found[self.total] += 1
            return found
        for frames, pieces in self.pictures:
            if span == "window":
                for entered, count in pieces.items():
                    found[self.left[entered]] += frames * count
            elif span == "frame":
                found[self._length(pieces)] += frames
            else:
                found[frames * self._length(pieces)] += 1
        return found

    def pairs(self, span: str) -> int:
        """Pairs of a query and a key in a block with this span."""
        return sum(count * length * length for length, count in self.lengths(span).items())

    def views(self) -> list[tuple[int, int, int]]:
        """What a method is shown: (rows, tokens, tokens that entered) of stretches of equal length."""
        found: Counter[int] = Counter()
        for frames, pieces in self.pictures:
            for entered, count in pieces.items():
                found[entered] += frames * count
        return [(count, self.left[entered], entered) for entered, count in found.items()]

    def cut(self, groups: Iterable[Group]) -> None:
        """Takes what a visit left.

        Args:
            groups: of the visit.

        Raises:
            NotCounted: stretches that were alike differ now, so that counts do not tell which are whose.
        """
        slots = {(group.n, group.entered): group.slots for group in groups}
        if any(slots[group.n, group.entered] != group.slots for group in groups):
            raise NotCounted("stretches of equal length were cut differently")
        self.left = {entered: slots.get((n, entered), n) for entered, n in self.left.items()}


def _pieces(shape: PackedTowerShape, rows: int, columns: int) -> Counter[int]:
    """Stretches of one frame, by the patches in them."""
    if not shape.window:
        return Counter([rows * columns])
    cell = shape.merge**2
    down, across = (_sides(side // shape.merge, shape.window) for side in (rows, columns))
    found: Counter[int] = Counter()
    for height, above in down.items():
        for width, beside in across.items():
            found[cell * height * width] += above * beside
    return found


def _sides(side: int, window: int) -> Counter[int]:
    """The pieces into which windows cut a side; the last one may be shorter."""
    whole, rest = divmod(side, window)
    found = Counter({window: whole}) if whole else Counter[int]()
    if rest:
        found[rest] += 1
    return found


def blocks_of(shape: PackedTowerShape, run: StageRun) -> list[Block] | None:
    """The blocks of a pass in which methods cut, from its grids and visits.

    Args:
        shape: the tower.
        run: the pass.

    Returns:
        None where no token left.

    Raises:
        NotCounted: its visits do not fit its grids, or its rows are padded.
    """
    if not any(event.kind == "cut" and event.stage == "vision" for event in run.events):
        return None
    if not shape.shared:
        raise NotCounted("tokens left rows that are padded, and how long those are now is not booked")
    row, found = Stretches(shape, run.grids), []
    for layer, span in enumerate(shape.spans):
        queries, pairs = row.total, row.pairs(span)
        mlp = queries
        for event in visits(run, layer):
            row.cut(event.groups)
            if row.total != event.after:
                raise NotCounted(f"its visits leave {row.total} tokens, and {event.after} went on")
            mlp = row.total if event.point == "mid" else mlp
        found.append(Block(queries, pairs, mlp))
    return found


def visits(run: StageRun, layer: int) -> list[Event]:
    """Visits of methods to a block of the tower, in order."""
    return [event for event in run.events if event.stage == "vision" and event.layer == layer and event.method >= 0]


def tokens_of(block: Block) -> Tokens:
    """The block as one row."""
    return Tokens(block.queries, block.queries, block.mlp, block.queries)


def booked(views: Iterable[tuple[int, int, int]], slots: Sequence[int], length: int) -> tuple[Group, ...]:
    """A visit's groups.

    Args:
        views: see `Stretches.views`.
        slots: of a view row of each.
        length: of the whole row.
    """
    return tuple(
        Group(rows, n, left, entered, 0, length) for (rows, n, entered), left in zip(views, slots, strict=True)
    )
