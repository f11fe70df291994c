"""The methods of these tests: the oracle's cuts as vlmtok sees them, and one that only looks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vlmtok
from vlmtok import Counts, Layout, Method, Reduction, Site, TokenView

from .oracle import Cut


def _site(layer: int | None, scope: str, positions: str | None = None) -> Site:
    if layer is None:
        return Site("projected", scope=scope, positions=positions)
    return Site("decoder", layer, "start", scope=scope, positions=positions)


def neighbours(tokens: Tensor) -> Reduction:
    """Every second token joins the one before it."""
    batch, n, _ = tokens.shape
    odd = torch.arange(1, n, 2).expand(batch, -1)
    return Reduction(torch.arange(0, n, 2).expand(batch, -1), odd, odd // 2)


@dataclass(eq=False)
class Top(Method):
    """`Cut` as a method: keeps the tokens of largest L2 norm, or merges neighbours."""

    cut: Cut = field(default_factory=lambda: Cut(0.5))

    def sites(self, layout: Layout) -> list[Site]:
        return [_site(self.cut.layer, self.cut.scope, self.cut.positions)]

    def reduce(self, view: TokenView) -> Reduction:
        if self.cut.keep is None:
            return neighbours(view.tokens)
        ranked = view.tokens.double().norm(dim=-1).argsort(dim=1, descending=True, stable=True)
        return Reduction(ranked[:, : self.count(view.counts)].sort(1).values)

    def count(self, counts: Counts) -> int:
        return (counts.n + 1) // 2 if self.cut.keep is None else int(self.cut.keep * counts.n + 0.5)


@dataclass(frozen=True)
class Seen:
    """One view row.

    Attributes:
        tokens: `[N, C]`.
        part: int64 `[N]`.
        columns: int64 `[N]`.
        grid: rows and columns, or None.
        clip: frames, and tokens of each.
    """

    tokens: Tensor
    part: Tensor
    columns: Tensor
    grid: tuple[int, int] | None
    clip: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Look(Method):
    """Cuts nothing and notes every view row it is shown."""

    unit: str = "picture"
    layer: int | None = None
    seen: list[Seen] = field(default_factory=list, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        return [_site(self.layer, self.unit)]

    def reduce(self, view: TokenView) -> None:
        for row in range(len(view.tokens)):
            clip = (view.frames, view.cells)
            self.seen.append(Seen(view.tokens[row], view.part[row], view.columns[row], view.grid, clip))


@contextlib.contextmanager
def compressed(model: nn.Module, cuts: Sequence[Cut], **options: Any) -> Iterator[Any]:
    """The model with these cuts inside the block; without any it is left alone."""
    if not cuts:
        yield None
        return
    with vlmtok.compress(model, [Top(cut) for cut in cuts], **options) as run:
        yield run


@dataclass(eq=False)
class InTower(Method):
    """Halves the patches behind a tower's layer: neighbours are averaged, or those of larger norm stay."""

    merge: bool = False
    layer: int = 0

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("vision", self.layer, "end")]

    def reduce(self, view: TokenView) -> Reduction:
        n = view.tokens.shape[1]
        if self.merge:
            return neighbours(view.tokens)
        ranked = view.tokens.double().norm(dim=-1).argsort(dim=1, descending=True, stable=True)
        return Reduction(ranked[:, : n // 2].sort(1).values)

    def count(self, counts: Counts) -> int:
        return counts.n // 2
