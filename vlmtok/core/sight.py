"""What a processor makes of pictures, as counts: tokens and parts in the language model, rows of the tower."""

from __future__ import annotations

from dataclasses import dataclass, field

Grid = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class Seen:
    """One picture of a row of the language model, as its adapter would find it there.

    Attributes:
        tokens: placeholders.
        parts: how many of them each part has; empty where it is one.
        apart: separators among them, which belong to no part.
        inside: text tokens between its first and its last.
        gap: text tokens between the one before and this one, where a processor makes several of one picture; 0 for the
            first.
        grids: rows and columns of the tokens of each part, or of all where it is one; None where they form no single
            grid. Empty where nobody told.
        columns: where its placeholders stand in the prompt.
        frames: frames of a clip; 0 for pictures.
        cells: tokens of each frame where all have as many; else 0.
    """

    tokens: int
    parts: tuple[int, ...] = ()
    apart: int = 0
    inside: int = 0
    gap: int = 0
    grids: tuple[Grid | None, ...] = ()
    columns: tuple[int, ...] = field(default=(), compare=False, repr=False)
    frames: int = 0
    cells: int = 0


@dataclass(frozen=True)
class Sight:
    """The pictures of one prompt.

    Attributes:
        pictures: for each picture or clip, what becomes of it in the language model: crops with marks of their own are
            pictures of their own there.
        crops: rows of the tower, of all pictures.
        patches: of a row of the tower; of all, where pictures share one row.
        grids: (frames, rows, columns) in patches of each picture, where pictures have sizes of their own.
    """

    pictures: tuple[tuple[Seen, ...], ...]
    crops: int
    patches: int
    grids: tuple[tuple[int, int, int], ...] = ()
