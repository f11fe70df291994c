"""The state of one stage during one forward, and the only place that shortens anything in a tower.

`TowerRow` says how the tokens of a row split into those a method sees, protected ones and inserted ones. `Sequence`
holds what travels with the view's tokens and follows every `Reduction`: sizes, sources, state, signals carried to later
sites, places among the tokens that entered.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .reduction import Reduction


@dataclass(frozen=True)
class TowerRow:
    """A row of a tower: `prefix` protected tokens, `n` tokens of the view, `inserted` ones behind.

    Attributes:
        prefix: protected tokens in front.
        n: the view's tokens.
        inserted: tokens that live for this block only.
    """

    prefix: int
    n: int
    inserted: int = 0

    @property
    def length(self) -> int:
        """L, the tokens of the whole row."""
        return self.prefix + self.n + self.inserted

    @property
    def guarded(self) -> int:
        """P, how many protected and inserted tokens there are."""
        return self.prefix + self.inserted

    def inner(self, x: Tensor, dim: int) -> Tensor:
        """The view's tokens along `dim` of a tensor over the whole row."""
        return x.narrow(dim, self.prefix, self.n)

    def guard(self, x: Tensor, dim: int) -> Tensor:
        """Protected tokens, then inserted ones, along `dim`."""
        if not self.inserted:
            return x.narrow(dim, 0, self.prefix)
        tail = x.narrow(dim, self.prefix + self.n, self.inserted)
        return torch.cat([x.narrow(dim, 0, self.prefix), tail], dim) if self.prefix else tail

    def apply(self, reduction: Reduction, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shortens a whole row by a reduction of the view; see `Reduction.apply`."""
        return reduction.apply(x, size, prefix=self.prefix, suffix=self.inserted)

    def apply_biased(
        self, reduction: Reduction, x: Tensor, size: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same with log(size); see `Reduction.apply_biased`."""
        return reduction.apply_biased(x, size, prefix=self.prefix, suffix=self.inserted)


@dataclass(frozen=True, eq=False)
class Step:
    """A reduction with the row it was taken on, so that it can be taken again on other tensors of that row.

    Attributes:
        reduction: of the view's tokens.
        row: the row before it.
        size: fp32 `[B, L]` before it, or None while all were 1.
    """

    reduction: Reduction
    row: TowerRow
    size: Tensor | None

    @property
    def kept(self) -> Tensor:
        """Place of each slot's own token in the whole row, int64 `[B, L']`."""
        return self.reduction.widen(self.row.prefix, self.row.n, self.row.inserted).keep

    def __call__(self, x: Tensor) -> Tensor:
        """Takes the step again."""
        return self.row.apply(self.reduction, x, self.size)[0]


@dataclass(eq=False)
class Sequence:
    """What travels with a stage's tokens during one forward.

    Attributes:
        row: the row as it is now.
        entered: view tokens that entered the stage.
        size: fp32 `[B, L]` over the whole row (inserted tokens have size 1), or None while all are 1.
        place: int64 `[B, N]`, the entering token that represents each slot, or None while that is the identity or
            nobody asks.
        source: int64 `[B, entered]`, slot of every entering token (-1 dropped); kept only for traces.
        states: per method, a dict of `[B, N, ...]`, gathered at `keep`.
        notes: per method and scope, a dict of `[B, ...]`, not gathered.
        carried: signals on their way to later sites, with the axis of the tokens.
        outputs: per method, outputs of the tokens it inserted last.
        logs: log(size) `[B, L]` in some dtype, or None until it is asked for.
        follow: whether `place` is wanted (rope tables).
        cuts: how many reductions were taken; what is made once per cut is keyed by it.
    """

    row: TowerRow
    entered: int
    size: Tensor | None = None
    place: Tensor | None = None
    source: Tensor | None = None
    states: dict[int, MutableMapping[str, Tensor]] = field(default_factory=dict)
    notes: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    carried: dict[str, tuple[Tensor | None, int | None]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    logs: Tensor | None = None
    follow: bool = False
    cuts: int = 0

    def state(self, method: int) -> MutableMapping[str, Tensor]:
        """The state dict of a method."""
        return self.states.setdefault(method, {})

    def note(self, method: int, scope: str) -> dict[str, Any]:
        """The row dict of a method and scope."""
        return self.notes.setdefault((method, scope), {})

    def view_size(self) -> Tensor | None:
        """Sizes of the view's tokens, fp32 `[B, N]`, or None while all are 1."""
        return None if self.size is None else self.row.inner(self.size, 1)

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """What proportional attention adds to the logits, `[B, 1, 1, L]`, or None while all sizes are 1."""
        if self.size is None:
            return None
        if self.logs is None or self.logs.dtype != dtype:
            self.logs = kernels.key_bias(self.size, dtype)[:, 0, 0]
        return self.logs[:, None, None, :]

    def resize(self, size: Tensor | None, logs: Tensor | None = None) -> None:
        """Books sizes, and their logarithms if they are there already."""
        self.size, self.logs = size, logs

    def insert(self, count: int) -> None:
        """Books tokens put at the end of the row."""
        self.row = TowerRow(self.row.prefix, self.row.n, self.row.inserted + count)
        if self.size is not None:
            self.resize(torch.cat([self.size, self.size.new_ones(self.size.shape[0], count)], 1))

    def discard(self) -> None:
        """Books that the inserted tokens are gone."""
        if self.size is not None:
            self.resize(self.size[:, : self.row.prefix + self.row.n])
        self.row = TowerRow(self.row.prefix, self.row.n)

    def restore(self) -> None:
        """Books that every entering token has a place again; what travelled with slots ends here."""
        self.row = TowerRow(self.row.prefix, self.entered)
        self.resize(None)
        self.place = None
        self.states.clear()
        self.carried.clear()
        self.cuts += 1

    def take(self, reduction: Reduction, x: Tensor, biased: bool = False) -> tuple[Tensor, Step]:
        """Shortens a row and everything that travels with it.

        Args:
            reduction: of the view's tokens.
            x: `[B, L, C]`, the whole row.
            biased: whether attention will ask for `key_bias`, so that the merge may make it on its way.

        Returns:
            The shorter row, and the step to take on other tensors of the same row.
        """
        step = Step(reduction, self.row, self.size)
        logs = None
        if biased:
            shorter, size, logs = self.row.apply_biased(reduction, x, self.size)
        else:
            shorter, size = self.row.apply(reduction, x, self.size)
        # Pruning leaves equal sizes equal: stay with None, so that no attention bias is made of ones.
        self.resize(size if self.size is not None or reduction.merges else None, logs)
        self.book(reduction)
        return shorter, step

    def book(self, reduction: Reduction, spare: int = 0) -> None:
        """Follows a reduction in everything but the tokens and their sizes.

        Args:
            reduction: of the view's tokens.
            spare: protected tokens that `keep` may name behind them; nothing travels with these.
        """
        for state in self.states.values():
            for key, value in state.items():
                state[key] = reduction.gather(padded(value, 1, spare))
        for key, (signal, axis) in self.carried.items():
            if axis is not None and signal is not None:
                self.carried[key] = (reduction.gather(padded(signal, axis, spare), axis), axis)
        if self.follow:
            self.place = reduction.keep if self.place is None else self.place.gather(1, reduction.keep)
        if self.source is not None:
            owner = reduction.assignment(self.row.n + spare)
            moved = owner.gather(1, self.source.clamp(min=0))
            self.source = torch.where(self.source < 0, -1, moved)
        self.row = TowerRow(self.row.prefix, reduction.slots, self.row.inserted)
        self.cuts += 1


def padded(table: Tensor, dim: int, spare: int) -> Tensor:
    """The table with `spare` zero entries more along `dim`."""
    if not spare:
        return table
    shape = list(table.shape)
    shape[dim] = spare
    return torch.cat([table, table.new_zeros(shape)], dim)
