"""Where the methods of an attachment act, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..tabular import Table
from .attachment import Attachment, Entry


def acting(attachment: Attachment, methods: Sequence[int]) -> Table:
    """Methods at their sites, with the signals that they get there and how often they were asked.

    Args:
        attachment: what carries them.
        methods: their places in its list.

    Returns:
        A row for each run of layers in which a method does alike.
    """
    runs: list[list[Entry]] = []
    for entry in sorted((e for e in attachment.entries if e.index in methods), key=lambda e: (e.index, e.order())):
        if runs and _alike(attachment, runs[-1][-1], entry):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    rows = [
        [
            str(run[0].method),
            str(run[0].site) if len(run) == 1 else _span(run),
            ", ".join(run[0].site.needs) or "none",
            run[0].scope,
            str(_visits(attachment, run[0])) + (" each" if len(run) > 1 else ""),
        ]
        for run in runs
    ]
    return Table(["method", "acts at", "signals", "of one", "asked"], rows)


def _span(run: Sequence[Entry]) -> str:
    first, last = run[0].site, run[-1].site
    return f"{first.stage} layers {first.layer} - {last.layer} {first.point}"


def _alike(attachment: Attachment, one: Entry, other: Entry) -> bool:
    """Whether two entries are one method's, in neighbouring layers, and the same but for the layer."""
    if one.site.layer is None or other.site.layer != one.site.layer + 1:
        return False
    same = [
        (entry.index, entry.site.stage, entry.site.point, entry.site.needs, entry.scope, _visits(attachment, entry))
        for entry in (one, other)
    ]
    return same[0] == same[1]


def _visits(attachment: Attachment, entry: Entry) -> int:
    site = entry.site
    return attachment.ledger.fired.get((site.stage, site.layer, site.point, entry.index), 0)
