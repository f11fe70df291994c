"""What methods note of a row: dicts that follow the row's tokens through cuts."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .row_data import Group

Unit = tuple[int, int, int]


class NotedRows(Protocol):
    """Rows `[batch, length]` that hold what methods note, for whom `states` follow every cut."""

    batch: int
    states: dict[tuple[int, str], Tensor]
    known: dict[tuple[int, str], set[Unit]]
    notes: dict[tuple[int, str], dict[str, dict[Unit, Any]]]

    @property
    def length(self) -> int:
        """Tokens of a row."""

    def gather(self, table: Tensor, group: Group) -> Tensor:
        """A table at a group's tokens."""


class TokenState(MutableMapping[str, Tensor]):
    """`TokenView.state` of a group: a window on tensors over all rows."""

    def __init__(self, rows: NotedRows, group: Group, method: int) -> None:
        self._rows, self._group, self._method = rows, group, method

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._rows.gather(self._rows.states[self._method, name], self._group)

    def __setitem__(self, name: str, value: Tensor) -> None:
        rows, group, key = self._rows, self._group, (self._method, name)
        table = rows.states.get(key)
        if table is None or table.shape[2:] != value.shape[2:] or table.dtype != value.dtype:
            table = value.new_zeros(rows.batch, rows.length, *value.shape[2:])
        rows.states[key] = table.index_put((group.index[:, None], group.columns), value)
        rows.known.setdefault(key, set()).update(group.units)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._rows.known[self._method, name].difference_update(self._group.units)

    def __contains__(self, name: object) -> bool:
        known = self._rows.known.get((self._method, str(name)), set())
        return set(self._group.units) <= known

    def __iter__(self) -> Iterator[str]:
        return (name for method, name in self._rows.known if method == self._method and name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class RowNotes(MutableMapping[str, Any]):
    """`TokenView.row` of a group: what was noted for its view rows."""

    def __init__(self, rows: NotedRows, group: Group, method: int, scope: str) -> None:
        self._units = group.units
        self._notes = rows.notes.setdefault((method, scope), {})

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        values = [self._notes[name][unit] for unit in self._units]
        if all(isinstance(value, Tensor) for value in values):
            return torch.stack(values)
        return values[0]

    def __setitem__(self, name: str, value: Any) -> None:
        note = self._notes.setdefault(name, {})
        split = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(self._units)
        for i, unit in enumerate(self._units):
            note[unit] = value[i] if split else value

    def __delitem__(self, name: str) -> None:
        for unit in self._units:
            del self._notes[name][unit]

    def __contains__(self, name: object) -> bool:
        note = self._notes.get(str(name), {})
        return bool(note) and all(unit in note for unit in self._units)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._notes if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
