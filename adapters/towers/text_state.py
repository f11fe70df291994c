"""What a forward through a text tower carries: its rows, masks that fit them, and steps that can be taken again."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.reduction import Reduction
from ...core.rows import PromptRows
from ...core.sequence import TowerRow


@dataclass(frozen=True, eq=False)
class TextStep:
    """A cut of rows that can be taken again.

    Attributes:
        pieces: row `[G, 1]`, columns `[G, N]`, reduction and sizes of each group.
        source: int64 `[B, L']`, column of each new column's token.
    """

    pieces: list[tuple[Tensor, Tensor, Reduction, Tensor | None]]
    source: Tensor

    @property
    def kept(self) -> Tensor:
        """Place of each slot's own token, int64 `[B, L']`."""
        return self.source

    def __call__(self, x: Tensor) -> Tensor:
        """Takes the step again."""
        for at, columns, reduction, size in self.pieces:
            if reduction.merges or reduction.keep_weight is not None:
                merged, _ = reduction.apply(x[at, columns], size)
                x = x.index_put((at, columns.gather(1, reduction.keep)), merged)
        return x.gather(1, self.source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass(eq=False)
class TextState:
    """What a forward through a text tower carries.

    Attributes:
        rows: the rows as they are.
        entered: columns that entered.
        end: int64 `[B]`, original column of the token that the head reads.
        inserted: tokens at the end of the rows that live for this block.
        cuts: cuts and inserts so far; masks are made once for each.
        outputs: per method, outputs of the tokens it inserted last, `[B, E, C]`.
        masks: attention masks made so far.
    """

    rows: PromptRows
    entered: int
    end: Tensor
    inserted: int = 0
    cuts: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the host's causal mask no longer fits."""
        return self.cuts > 0

    @property
    def row(self) -> TowerRow:
        """The row, as far as the block hooks ask."""
        return TowerRow(0, self.rows.length - self.inserted, self.inserted)

    @property
    def source(self) -> None:
        """Text towers keep no traces."""
        return None

    def mask(self, dtype: torch.dtype, causal: bool, size: Tensor | None) -> Tensor:
        """What is added to the logits, `[B or 1, 1, L, L]`; made once for each cut.

        Args:
            dtype: of the rows.
            causal: whether a token sees only what stands before it.
            size: fp32 `[B, L]`, sizes that count in the attention, or None.
        """
        rows, device = self.rows, self.end.device
        key = (self.cuts, self.inserted, size is not None)
        if key in self.masks:
            return self.masks[key]
        mask = torch.zeros(1, 1, rows.length, rows.length, dtype=dtype, device=device)
        low = torch.finfo(dtype).min
        if causal:
            mask = mask + torch.full((rows.length, rows.length), low, dtype=dtype, device=device).triu(1)
        if rows.valid is not None:
            mask = mask.masked_fill(~rows.valid[:, None, None, :], low)
        if size is not None:
            mask = mask + size.log().to(dtype)[:, None, None, :]
        self.masks[key] = mask.clamp(min=low)
        return self.masks[key]
