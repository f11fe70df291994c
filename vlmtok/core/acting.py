"""Where the methods of an attachment act, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..tabular import Table
from .attachment import Attachment, Entry
from .site import named, runs_of_layers


def acting(attachment: Attachment, methods: Sequence[int]) -> Table:
    """Methods at their sites, with the signals that they get there and how often they were asked.

    Args:
        attachment: what carries them.
        methods: their places in its list.

    Returns:
        A row for each run of layers in which a method does alike.
    """
    entries = sorted((e for e in attachment.entries if e.index in methods), key=lambda e: (e.index, e.order()))

    def same(entry: Entry) -> object:
        return entry.index, entry.site.needs, entry.scope, _visits(attachment, entry)

    runs = runs_of_layers(entries, lambda entry: entry.site, same)
    rows = [
        [
            str(run[0].method),
            named([entry.site for entry in run]),
            ", ".join(run[0].site.needs) or "none",
            run[0].scope,
            str(_visits(attachment, run[0])) + (" each" if len(run) > 1 else ""),
        ]
        for run in runs
    ]
    return Table(["method", "acts at", "signals", "of one", "asked"], rows)


def _visits(attachment: Attachment, entry: Entry) -> int:
    site = entry.site
    return attachment.ledger.fired.get((site.stage, site.layer, site.point, entry.index), 0)
