"""What a method is shown of some tokens of a language model's rows, wherever it acts on them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.attachment import Attachment, Entry
from ...core.row_data import Group
from ...core.rows import PromptRows
from ...core.signals import Need
from ...core.view import Signal, TokenView


def view_of(
    attachment: Attachment,
    entry: Entry,
    rows: PromptRows,
    group: Group,
    tokens: Tensor,
    signals: dict[str, Signal],
    **more: Any,
) -> TokenView:
    """A view of some view rows, with the user's signals.

    Args:
        attachment: whose method it is for.
        entry: the method at its site.
        rows: the rows there.
        group: the view rows.
        tokens: `[G, N, C]`.
        signals: by need; the user's are added.
        more: depth and notes, as `TokenView` takes them.
    """
    view = TokenView(
        tokens,
        entry.asked,
        size=None if rows.size is None else rows.gather(rows.size, group),
        grid=group.grid,
        part=None if rows.part is None else rows.gather(rows.part, group),
        picture=rows.gather(rows.label, group) if entry.scope == "sample" else None,
        entered=group.entered,
        columns=rows.relative(group, group.columns),
        signals=signals,
        memory=attachment.remember(entry.index),
        frames=group.frames,
        cells=group.cells,
        **more,
    )
    attachment.bind_user(view, signals)
    return view


def carried_signal(need: Need, rows: PromptRows, group: Group) -> Signal:
    """A signal of the tower at a group's tokens."""
    carried = rows.carried.get(f"{need.name}@{need.layer}")
    if carried is None:
        return None
    table, axis = carried
    if axis is None:
        return table[rows.of_pictures(group)]
    return lambda: rows.gather(table, group).movedim(1, axis)
