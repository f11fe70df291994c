"""View rows: which pictures, parts or samples a method sees together, and how many tokens each has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from .pictures import HELD, SEPARATOR, Picture
from .row_data import Group, PromptRowData

Unit = tuple[tuple[int, int, int], list[Picture], int]
"""A view row: row, picture or -1, part or -1; its pictures; its tokens."""
BETWEEN = -2
"""The part of a unit that holds a picture's separators."""


def groups(rows: PromptRowData, scope: str, by_text: bool = False, by_length: bool = False) -> list[Group]:
    """View rows that can be stacked: those with equal counts, and equal text and lengths where asked."""
    found: dict[tuple[Any, ...], list[Unit]] = {}
    for unit, members, n in _units(rows, scope):
        if n == 0:
            continue
        text = members[0].text_after
        key = (
            n,
            text if by_text else None,
            rows.lengths[unit[0]] if by_length else None,
            sum(p.entered for p in members) if unit[2] < 0 else 0,
            _grid(members, n, unit[2]),
            _frames(members, n, unit),
        )
        found.setdefault(key, []).append((unit, members, n))
    return [_group(rows, alike, scope) for alike in found.values()]


def _units(rows: PromptRowData, scope: str) -> Iterator[Unit]:
    """All view rows of a scope, in order of rows and pictures."""
    if scope == "sample":
        for row in range(rows.batch):
            members = [p for p in rows.pictures if p.row == row]
            if members:
                yield (row, -1, -1), members, sum(count(rows, p) for p in members)
        return
    for picture in rows.pictures:
        whole = scope in ("picture", "clip") or (scope == "frame" and not picture.video)
        if rows.part is None or (whole and scope == "picture"):
            yield (picture.row, picture.index, -1), [picture], count(rows, picture)
            continue
        if whole:
            here = (rows.label[picture.row] == picture.index) & (rows.part[picture.row] != SEPARATOR)
            yield (picture.row, picture.index, -1), [picture], int(here.sum())
            continue
        here = (rows.label[picture.row] == picture.index) & (rows.part[picture.row] >= 0)
        parts = rows.part[picture.row][here].tolist()
        for part in sorted(set(parts)):
            yield (picture.row, picture.index, part), [picture], parts.count(part)


def separators(rows: PromptRowData, of: Collection[tuple[int, int]]) -> list[Group]:
    """The separators of some pictures, grouped by equal counts; methods never see these groups.

    Args:
        rows: as they are.
        of: (row, picture); a picture of -1 means all of the row.
    """
    if rows.part is None:
        return []
    found: dict[int, list[Unit]] = {}
    for picture in rows.pictures:
        if (picture.row, picture.index) not in of and (picture.row, -1) not in of:
            continue
        n = int(((rows.label[picture.row] == picture.index) & (rows.part[picture.row] == SEPARATOR)).sum())
        if n:
            found.setdefault(n, []).append(((picture.row, picture.index, BETWEEN), [picture], n))
    return [_group(rows, alike, "separators") for alike in found.values()]


def _group(rows: PromptRowData, alike: list[Unit], scope: str) -> Group:
    """View rows of one key of `groups` as tensors."""
    device = rows.label.device
    units = [unit for unit, _, _ in alike]
    n = alike[0][2]
    index = torch.tensor([unit[0] for unit in units], device=device)
    label = rows.label[index]
    if scope == "sample":
        mask = label >= 0
    else:
        mask = label == torch.tensor([unit[1] for unit in units], device=device)[:, None]
        if scope == "separators" and rows.part is not None:
            mask &= rows.part[index] == SEPARATOR
        elif scope != "picture" and rows.part is not None:
            asked = torch.tensor([unit[2] for unit in units], device=device)[:, None]
            mask &= torch.where(asked < 0, rows.part[index] != SEPARATOR, rows.part[index] == asked)
    column = torch.arange(rows.length, device=device)
    columns = torch.where(mask, column, rows.length).sort(1).values[:, :n]
    return Group(
        units,
        index,
        columns,
        n,
        alike[0][1][0].text_after,
        rows.lengths[units[0][0]],
        any(members[0].text_after != members[-1].text_after_last for _, members, _ in alike),
        sum(p.entered for p in alike[0][1]) if units[0][2] < 0 else n,
        _grid(alike[0][1], n, units[0][2]),
        *_frames(alike[0][1], n, units[0]),
    )


def count(rows: PromptRowData, picture: Picture) -> int:
    """Tokens of a picture that are here; the device is asked once where the host does not know."""
    if picture.n is None:
        most = max(p.index for p in rows.pictures) + 1
        table = torch.stack([(rows.label == i).sum(1) for i in range(most)]).tolist()
        for other in rows.pictures:
            other.n = int(table[other.index][other.row])
    return 0 if picture.n is None else picture.n


def enter(rows: PromptRowData, hold: bool = False) -> None:
    """The pictures enter: counts are noted, and a visual token that ends its row is held back where asked."""
    if hold:
        for picture in rows.pictures:
            ends = picture.text_after_last == 0
            last = picture.index == max(p.index for p in rows.pictures if p.row == picture.row)
            if ends and last and count(rows, picture):
                end = rows.label.new_full((1,), _last(rows, picture.row))
                rows.label = rows.label.index_put((rows.label.new_tensor([picture.row]), end), end.new_tensor(HELD))
                picture.n = count(rows, picture) - 1
    for picture in rows.pictures:
        picture.entered = count(rows, picture)


def _last(rows: PromptRowData, row: int) -> int:
    """The last valid column of a row's prompt; rows that were never cut may be padded on the right."""
    if rows.valid is None:
        return rows.length - 1 - rows.drafts
    return int(rows.valid[row].nonzero()[-1 - rows.drafts])


def _grid(members: list[Picture], n: int, part: int) -> tuple[int, int] | None:
    """Rows and columns of a view row's n tokens; None for several pictures, and once some of its tokens are gone."""
    grid = members[0].fields.get(part, members[0].grid) if len(members) == 1 else None
    return grid if grid is not None and grid[0] * grid[1] == n else None


def _frames(members: list[Picture], n: int, unit: tuple[int, int, int]) -> tuple[int, int]:
    """Frames of a view row's n tokens, and tokens of each while they are whole; (0, 0) where it is no clip.

    Pictures of a sample count as frames where they are alike.
    """
    _, index, part = unit
    if part >= 0:
        return 0, 0
    first = members[0]
    if index >= 0 or (len(members) == 1 and first.video):
        return first.frames, first.cells if n == first.frames * first.cells else 0
    if any(p.video or p.fields or p.grid != first.grid or len(p.columns) != len(first.columns) for p in members):
        return 0, 0
    cells = len(first.columns)
    return len(members), cells if n == len(members) * cells else 0
