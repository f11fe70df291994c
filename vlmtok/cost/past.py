"""What is known of counts that depend on content: what a run recorded, what was given, or a bound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..core.attachment import Attachment
from ..core.ledger import Event, StageRun
from ..core.site import Site, named, runs_of_layers
from ..errors import ParameterError

Key = tuple[str, int | None, str, int]
"""Stage, layer, point and method of a site; method -1 is the language model's boundary."""


@dataclass
class Past:
    """What is known of content-dependent counts.

    Attributes:
        fixed: slots of a view row, by site (as ``str(site)`` writes it); they win over `Method.count`.
        events: what a run recorded, by stage of the run and site.
        nothing: take the bound at which nothing is dropped; else everything is.
        met: methods and sites at which one of the bounds was taken.
        evenly: methods of which it is known what all layers' caches keep together, and was dealt out evenly.
    """

    fixed: Mapping[str, int] = field(default_factory=dict)
    events: Mapping[str, Mapping[Key, Event]] = field(default_factory=dict)
    nothing: bool = True
    met: list[tuple[str, Site]] = field(default_factory=list)
    evenly: set[str] = field(default_factory=set)

    def met_at(self) -> str:
        """Methods and sites of `met`, in words; layers that follow each other are one."""
        found = list(dict.fromkeys(self.met))
        runs = [
            (name, run)
            for name in dict.fromkeys(name for name, _ in found)
            for run in runs_of_layers([site for by, site in found if by == name], lambda site: site, lambda site: None)
        ]
        return ", ".join(f"{name} at {named(run)}" for name, run in runs)

    @classmethod
    def of(cls, runs: Iterable[StageRun], first: int = 0) -> Past:
        """What passes recorded; the first method has the number `first` there."""

        def key(event: Event) -> Key:
            return (event.stage, event.layer, event.point, event.method - first if event.method >= 0 else -1)

        return cls(events={run.stage: {key(event): event for event in _chosen(run)} for run in runs})


def _chosen(run: StageRun) -> Iterator[Event]:
    """Visits of methods that tell what stayed of a view row.

    Entries that left a cache with tokens of later layers are no visit, and nobody chose them. How many of several view
    rows stayed in a row that keeps as many as its content says is not booked.
    """
    lost = {event.layer: (event.gone or 0) // run.rows for event in run.events if event.kind == "forget"}
    for event in run.events:
        several = event.ragged and sum(group.rows for group in event.groups) > run.rows
        if event.stage != "cache":
            yield event
        elif event.kind != "forget" and not event.written and not several:
            yield replace(event, before=event.before - lost.get(event.layer, 0))


def check_counts(counts: Mapping[str, int], attachment: Attachment) -> None:
    """Checks that given counts name sites of the methods.

    Raises:
        ParameterError: one does not; the message names the sites there are.
    """
    known = {str(entry.site) for entry in attachment.entries}
    for site, count in counts.items():
        if site not in known:
            raise ParameterError(f"counts: no site {site!r}; sites: {', '.join(sorted(known))}")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ParameterError(f"counts: {site}={count!r} must be a number of tokens")


def left_of(recorded: Event | None, n: int, entered: int, stretches: bool) -> int | None:
    """Slots that a recorded visit left of a view row; None where it does not tell.

    Args:
        recorded: the visit, or None.
        n: tokens of the view row.
        entered: of them.
        stretches: whether the books tell what stayed of a view row of each length, for the row's length does not:
            stretches of one row, and caches, which lose entries to later cuts, too.
    """
    if recorded is None:
        return None
    if not stretches:
        return max(n - (recorded.before - recorded.after), 0)
    return next((group.slots for group in recorded.groups if (group.n, group.entered) == (n, entered)), None)


def arrived(event: Event) -> int:
    """Tokens that all views of a visit held."""
    return sum(group.rows * group.n for group in event.groups)
