"""A picture in the row of a language model, and the labels of columns that belong to none."""

from __future__ import annotations

from dataclasses import dataclass, field

TEXT, PAD, HELD = -1, -2, -3
"""Labels of columns that belong to no picture. HELD is read and never cut: a visual token that ends its row, what was
appended, drafts of speculative decoding."""
SEPARATOR = -1
"""The part of tokens that a host puts between rows of patches."""


@dataclass
class Picture:
    """A picture of a row, as host ints.

    Attributes:
        row: its row.
        index: its place among the row's pictures.
        columns: original columns of its tokens.
        runs: where, among these, each of its runs begins.
        video: whether it is a clip.
        frames: of a clip, as the language model gets them (a temporal patch is one); 0 for pictures.
        cells: tokens of each frame where all have as many, separators not among them; else 0.
        grid: rows and columns of patches (of each crop or frame, where these are equally large), or None.
        fields: rows and columns of the parts that differ from `grid`.
        tower: which picture of the tower it is.
        text_after: text columns of the row behind its first token.
        text_after_last: text columns behind its last token.
        n: tokens it has now; None while only the device knows.
        entered: tokens it had when it entered the stage.
        hidden: for each of its tokens, whether the attention mask hides it; empty while none is.
    """

    row: int
    index: int
    columns: list[int]
    runs: list[int] = field(default_factory=lambda: [0])
    video: bool = False
    frames: int = 0
    cells: int = 0
    grid: tuple[int, int] | None = None
    fields: dict[int, tuple[int, int]] = field(default_factory=dict)
    tower: int = 0
    text_after: int = 0
    text_after_last: int = 0
    n: int | None = None
    entered: int = 0
    hidden: list[bool] = field(default_factory=list)

    def show(self) -> None:
        """Lets go of tokens that the mask hides: they are padding, and what is left is no grid."""
        if not any(self.hidden):
            return
        before = [sum(not gone for gone in self.hidden[:start]) for start in self.runs]
        self.columns = [column for column, gone in zip(self.columns, self.hidden) if not gone]
        self.runs = sorted({start for start in before if start < len(self.columns)})
        self.grid, self.fields, self.hidden, self.cells = None, {}, [], 0
