"""What ran, as host ints: the ground on which reports and estimates stand."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """One batched call of `reduce`.

    Attributes:
        rows: view rows.
        n: tokens of each that arrived.
        slots: slots of each that stayed.
        entered: tokens of each when it entered the stage.
        text: text rows behind the view's first token (language models).
        length: length of the whole row, padding left out (language models) or not (towers).
    """

    rows: int
    n: int
    slots: int
    entered: int
    text: int = 0
    length: int = 0


@dataclass(frozen=True)
class Event:
    """One visit of a method to a site.

    Attributes:
        stage: of the site.
        layer: of the site, or None.
        point: of the site.
        method: index of the method in its list.
        kind: ``cut``, ``observe`` (nothing reduced) or ``insert``.
        before: tokens of a whole row before, padding included.
        after: tokens of a whole row after.
        groups: the batched calls.
        ragged: whether the rows may differ in what they keep.
    """

    stage: str
    layer: int | None
    point: str
    method: int
    kind: str
    before: int
    after: int
    groups: tuple[Group, ...] = ()
    ragged: bool = False


@dataclass
class StageRun:
    """One pass through one stage.

    Attributes:
        stage: ``vision``, ``text`` or ``decoder``; the latter holds `features` and `projected` too.
        rows: rows of the batch.
        entered: tokens of a row that entered, protected ones and padding included.
        past: tokens that the cache held before (language models).
        pictures: pictures of the pass (language models).
        cached: whether keys and values were cached.
        events: visits, in order.
    """

    stage: str
    rows: int
    entered: int
    past: int = 0
    pictures: int = 0
    cached: bool = False
    events: list[Event] = field(default_factory=list)

    def key(self) -> tuple[object, ...]:
        """What two passes of the same cost share."""
        return (self.stage, self.rows, self.entered, self.past, self.pictures, self.cached, tuple(self.events))


@dataclass
class Decoding:
    """Decode steps since the last prefill.

    Attributes:
        steps: how many.
        rows: rows of each.
    """

    steps: int = 0
    rows: int = 0


@dataclass
class Ledger:
    """Passes of a compression.

    Attributes:
        last: the last pass of each stage.
        passes: how many passes each stage has seen.
        fired: visits per (stage, layer, point, method).
        decoding: decode steps behind the last prefill.
    """

    last: dict[str, StageRun] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    fired: dict[tuple[str, int | None, str, int], int] = field(default_factory=dict)
    decoding: Decoding = field(default_factory=Decoding)
    steps: int = 0
    _totals: dict[tuple[object, ...], tuple[StageRun, int]] = field(default_factory=dict)

    def begin(self, run: StageRun) -> StageRun:
        """Opens the books of a pass; those of the stage's pass before are closed."""
        if run.stage in self.last:
            self._close(self.last[run.stage])
        self.last[run.stage] = run
        self.passes[run.stage] = self.passes.get(run.stage, 0) + 1
        if run.stage == "decoder":
            self.decoding = Decoding()
        return run

    def visit(self, run: StageRun, event: Event) -> None:
        """Books one visit."""
        run.events.append(event)
        key = (event.stage, event.layer, event.point, event.method)
        self.fired[key] = self.fired.get(key, 0) + 1

    def step(self, rows: int) -> None:
        """Books one decode step."""
        self.decoding.steps += 1
        self.decoding.rows = rows
        self.steps += 1

    def totals(self) -> list[tuple[StageRun, int]]:
        """Every kind of pass so far, with how often it ran."""
        kinds = dict(self._totals)
        for run in self.last.values():
            key = run.key()
            kinds[key] = (run, kinds.get(key, (run, 0))[1] + 1)
        return list(kinds.values())

    def _close(self, run: StageRun) -> None:
        key = run.key()
        self._totals[key] = (run, self._totals.get(key, (run, 0))[1] + 1)
