"""What becomes of tokens, who decides it, and what is seen at the place where it is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Cut(NamedTuple):
    """What becomes of N tokens.

    Attributes:
        keep: int64 [K], the token whose place, position and rotation each slot takes.
        mix: [K, M], the values: slots = mix @ tokens, M = N and the protected tokens that may be named behind them.
        own: [K, M] of 0 and 1, which slot owns which token.
    """

    keep: Tensor
    mix: Tensor
    own: Tensor

    def tokens(self, x: Tensor) -> Tensor:
        return (self.mix.double() @ x.double()).to(x.dtype)

    def follow(self, table: Tensor, axis: int = 0) -> Tensor:
        """A table with one entry a token; tokens that only `features` can name have none (zeros)."""
        extra = self.mix.shape[1] - table.shape[axis]
        if extra:
            shape = list(table.shape)
            shape[axis] = extra
            table = torch.cat([table, table.new_zeros(shape)], axis)
        return table.index_select(axis, self.keep)


def select(keep: Tensor, n: int) -> Cut:
    """Pruning."""
    rows = F.one_hot(keep, n).double()
    return Cut(keep, rows, rows)


Signals = dict[str, tuple[Tensor, int | None]]
"""Name to a tensor without batch and the axis of its tokens."""


@dataclass
class Moment:
    """One place of the forward, as one view row sees it.

    Attributes:
        stage, layer, point: where.
        tokens: [N, C].
        size: [N].
        who: int64 [N], which token that entered each one is (or goes on from).
        signals: those of this place, and ``name@stage:layer`` for those carried here.
        prefix: protected tokens in front.
        depth: layers of the stage.
        entered: tokens when the stage began.
        grid: of the patches, or None.
        columns: int64 [N], places in the whole row.
        unit: row and picture (-1: all of the row).
        frames: pictures of the row where all are alike, for what takes them for a clip.
    """

    stage: str
    layer: int | None
    point: str
    tokens: Tensor
    size: Tensor
    who: Tensor
    signals: Signals
    prefix: int = 0
    depth: int = 1
    entered: int = 0
    grid: tuple[int, int] | None = None
    columns: Tensor | None = None
    unit: tuple[int, int] = (0, -1)
    frames: int = 0


class Decider(Protocol):
    """Who decides; visits are opaque to the oracle, but for the attribute `index`, which tells methods apart."""

    def visits(self, stage: str, layer: int | None = None, point: str = "end") -> list[Any]:
        """Who acts here, in order."""

    def acts(self, stage: str) -> bool:
        """Whether anybody acts in this stage."""

    def skips(self, layer: int) -> frozenset[str]:
        """Branches (``ffn``, ``attn``) that a decoder layer leaves out for visual tokens."""

    def scope(self, visit: Any) -> str:
        """``picture`` or ``sample``."""

    def renumbers(self, visit: Any) -> bool:
        """Whether positions become contiguous after its cut."""

    def insert(self, visit: Any, moment: Moment) -> Tensor | None:
        """Tokens [E, C] to put at the end of the row for one block."""

    def decide(self, visit: Any, moment: Moment) -> Cut | None:
        """What stays."""

    def bias_from(self) -> int:
        """First tower layer whose attention logits get log(size)."""

    def forgets(self, visit: Any) -> bool:
        """Whether caches of the layers before lose the entries of what it drops."""

    def window(self, visit: Any) -> int:
        """Last rows of the prompt that ``recent_mass`` sums over."""

    def every(self, visit: Any) -> int:
        """Decode steps after which it is asked again, or 0."""

    def joins(self, visit: Any) -> tuple[bool, bool]:
        """At ``cache``: whether keys mix as values do, and whether merged entries get log(size)."""

    def plan(self, cases: list[tuple[Any, Moment]]) -> None:
        """All visits of one view row at ``cache``, in the order of the layers, before any `evict`."""

    def evict(self, visit: Any, moment: Moment) -> list[Cut] | None:
        """What stays of entries: one cut for all key-value heads, or one a head."""
