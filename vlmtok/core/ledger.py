"""What ran, as host ints: the ground on which reports and estimates stand."""

from __future__ import annotations

import threading
from dataclasses import astuple, dataclass, field, replace

import torch

from ..kernels import ran
from .events import Decoding, Event, Group, Mass, Skip

__all__ = ["Books", "Decoding", "Event", "Group", "Ledger", "Mass", "Skip", "StageRun"]

MOST_UNREAD = 1024
"""Closed passes whose grids may still lie on a device."""


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
        visual: visual tokens of all rows that entered (language models).
        seen: tokens that the cache of a bare model would have held before.
        held: (first layer, tokens) of each run of layers whose caches hold equally many; empty means `past` in all.
        events: visits, in order.
        parts: rows that modules outside the blocks saw, by name (see `vlmtok.core.model_shape.Part`).
        decodings: decode steps behind it.
        captured: whether it was captured into a CUDA graph, whose replays run no Python.
        grids: frames, rows and columns of patches of each picture (towers that take any size), and
        told: the same as the host's own tensor, int `[pictures, 3]`, which `read` turns into numbers.
        mixed: whether it shows pictures and clips, which hosts encode in two calls of the tower (language models).
        skips: what was left out for visual tokens (language models).
        masses: what was summed for methods at the key-value cache (language models).
    """

    stage: str
    rows: int
    entered: int
    past: int = 0
    pictures: int = 0
    cached: bool = False
    visual: int = 0
    seen: int = 0
    held: tuple[tuple[int, int], ...] = ()
    events: list[Event] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
    decodings: list[Decoding] = field(default_factory=list)
    captured: bool = False
    grids: tuple[tuple[int, ...], ...] = ()
    told: torch.Tensor | None = None
    mixed: bool = False
    skips: list[Skip] = field(default_factory=list)
    masses: list[Mass] = field(default_factory=list)

    def read(self) -> None:
        """Reads what the host told, which waits for the device."""
        if self.told is not None:
            self.grids, self.told = tuple(tuple(grid) for grid in self.told.tolist()), None

    @property
    def continues(self) -> bool:
        """Whether it adds text to a filled cache: a later turn, or candidates that are checked."""
        return bool(self.past) and not self.pictures

    @property
    def columns(self) -> int:
        """Tokens of a row that reach the first layer of a language model, padding included."""
        return self.reaching(0)

    def reaching(self, layer: int) -> int:
        """Tokens of a row that reach a layer of a language model, padding included."""
        left = [event.after for event in self.events if event.reaches is not None and event.reaches <= layer]
        return left[-1] if left else self.entered

    def before(self, layer: int) -> int:
        """Entries of a row that a layer's cache held before, padding included."""
        return max(self.held, default=(0, self.past), key=lambda part: part[0] if part[0] <= layer else -1)[1]

    def keeps(self, layer: int) -> int:
        """Entries of a row that a layer's cache keeps behind it, padding included; of a window as if it saw all."""
        left = [event.after for event in self._evictions(layer) if not event.written]
        return left[-1] if left else self.before(layer) + self.reaching(layer)

    def losses(self, layer: int) -> list[tuple[int, int]]:
        """What left a layer's cache in decode steps: tokens written until then, and entries of a row, in order."""
        return [(event.written, event.before - event.after) for event in self._evictions(layer) if event.written]

    def _evictions(self, layer: int) -> list[Event]:
        return [event for event in self.events if event.stage == "cache" and event.layer == layer]

    @property
    def steps(self) -> int:
        """Decode steps behind it."""
        return sum(decoding.steps for decoding in self.decodings)

    def key(self) -> tuple[object, ...]:
        """What two passes of the same cost share; it must have been read."""
        tables = (tuple(self.events), tuple(sorted(self.parts.items())), tuple(map(astuple, self.decodings)))
        shape = (self.stage, self.rows, self.entered, self.past, self.pictures, self.cached, self.visual, self.seen)
        return (*shape, self.held, self.grids, tuple(self.skips), tuple(self.masses), *tables)


@dataclass
class Books:
    """What a thread ran last.

    Attributes:
        last: the last pass of each stage, see `Ledger.last`.
        decoder: the last prefill, to which decode steps belong.
        encoded: the last pass of the vision tower since then, and
        before: the one before it.
        earlier: the pass of pictures where the last prefill with pictures took clips from `last` too.
    """

    last: dict[str, StageRun] = field(default_factory=dict)
    decoder: StageRun | None = None
    encoded: StageRun | None = None
    before: StageRun | None = None
    earlier: StageRun | None = None

    def name(self, run: StageRun) -> str:
        """Under which name a pass stands."""
        if run.stage != "decoder" or run.pictures:
            return run.stage
        if not run.continues:
            return "pictureless"
        follows = [name for name in ("pictureless", "pictureless continued") if name in self.last]
        return "pictureless continued" if any(self.last[name] is self.decoder for name in follows) else "continued"


@dataclass
class Ledger:
    """Passes of a compression.

    Attributes:
        passes: how many passes each stage has seen.
        fired: visits per (stage, layer, point, method).
        steps: decode steps so far.
        kernels: calls of `vlmtok.kernels` in this process before the compression.
        unseen: whether a prompt came as embeddings alone, in which pictures cannot be found.
        uncounted: paths of modules that ran and are not counted (see `vlmtok.core.model_shape.Uncounted`).
    """

    passes: dict[str, int] = field(default_factory=dict)
    fired: dict[tuple[str, int | None, str, int], int] = field(default_factory=dict)
    steps: int = 0
    kernels: dict[str, int] = field(default_factory=ran)
    unseen: bool = False
    uncounted: set[str] = field(default_factory=set)
    _books: dict[int, Books] = field(default_factory=dict)
    _latest: Books | None = None
    _totals: dict[tuple[object, ...], tuple[StageRun, int]] = field(default_factory=dict)
    _unread: list[StageRun] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def mine(self) -> Books:
        """The books of this thread."""
        thread = threading.get_ident()
        found = self._books.get(thread)
        if found is None:
            found = self._books[thread] = Books()
        return found

    @property
    def last(self) -> dict[str, StageRun]:
        """The last pass of each stage, in this thread or else in the one that ran last.

        What adds text to a filled cache stands under ``continued``, and a prompt without pictures under ``pictureless``
        (what continues it under ``pictureless continued``), so that the last prefill with pictures is not lost behind
        them.
        """
        books = self._books.get(threading.get_ident()) or self._latest
        return {} if books is None else books.last

    @property
    def earlier(self) -> StageRun | None:
        """The tower's pass of pictures, where the last prefill had clips too, of whose pass `last` tells."""
        books = self._books.get(threading.get_ident()) or self._latest
        return None if books is None else books.earlier

    @property
    def blind(self) -> bool:
        """Whether a language model ran, and never with a picture."""
        runs = [run for run, _ in self.totals() if run.stage == "decoder"]
        return bool(runs) and not any(run.pictures for run in runs)

    @property
    def blindness(self) -> str:
        """Why no picture was seen, for a reader."""
        if self.unseen:
            return "the prompt came as embeddings alone, in which pictures that are merged in cannot be found"
        return "no prompt had a picture"

    def begin(self, run: StageRun) -> StageRun:
        """Opens the books of a pass; those of the stage's pass before are closed."""
        if not torch.compiler.is_compiling() and torch.cuda.is_initialized():
            run.captured = torch.cuda.is_current_stream_capturing()
        books = self._latest = self.mine
        name = books.name(run)
        if run.stage == "vision":
            books.before, books.encoded, books.earlier = books.encoded, run, None
        counted = "continued" if run.continues else run.stage
        with self._lock:
            for closed in (name, f"{name} continued", "continued" if name == "decoder" else name):
                if closed in books.last:
                    self._close(books.last.pop(closed))
            books.last[name] = run
            self.passes[counted] = self.passes.get(counted, 0) + 1
        if run.stage == "decoder":
            books.decoder = run
            if run.pictures:
                books.earlier = books.before if run.mixed else None
            books.before, books.encoded = None, None
        return run

    def visit(self, run: StageRun | None, event: Event) -> None:
        """Books one visit.

        Args:
            run: the pass; None for the decode step that ran last.
            event: the visit.
        """
        if run is not None:
            run.events.append(event)
        elif self.mine.decoder is not None and self.mine.decoder.decodings:
            step = self.mine.decoder.decodings[-1]
            self.mine.decoder.events.append(replace(event, written=step.first + step.steps))
        if event.kind == "forget":
            return  # nobody was asked there
        key = (event.stage, event.layer, event.point, event.method)
        with self._lock:
            self.fired[key] = self.fired.get(key, 0) + 1

    def step(self, rows: int, past: int, layer: int = 0, recorded: bool = False) -> None:
        """Books one decode step.

        Args:
            rows: of the batch.
            past: tokens that the cache held before,
            layer: by this layer: the first that keeps keys.
            recorded: see `Decoding`.
        """
        run = self.mine.decoder
        if run is None:  # the cache was filled bare
            run = self.begin(StageRun("decoder", rows, 0, past, seen=past))
        joined = past - run.keeps(layer) + sum(lost for _, lost in run.losses(layer))
        last = run.decodings[-1] if run.decodings else None
        if last is None or (last.rows, last.first + last.steps, last.recorded) != (rows, joined, recorded):
            last = Decoding(rows, joined, recorded=recorded)
            run.decodings.append(last)
        last.steps += 1
        with self._lock:
            self.steps += 1

    def note(self, stage: str, part: str, rows: int, steps: bool = True) -> None:
        """Books rows that a module outside the blocks saw.

        Args:
            stage: whose last pass it belongs to.
            part: its name.
            rows: rows of its input; pictures for a pool.
            steps: whether it counts in decode steps too, as a head does.
        """
        books = self.mine
        run = books.decoder if stage == "decoder" else books.last.get(stage)
        if run is None:
            return
        if run.decodings:
            run.decodings[-1].head += rows if steps else 0
        else:
            run.parts[part] = run.parts.get(part, 0) + rows

    def totals(self) -> list[tuple[StageRun, int]]:
        """Every kind of pass so far, with how often it ran."""
        with self._lock:
            self._read()
            kinds = dict(self._totals)
            running = [run for books in self._books.values() for run in books.last.values()]
        for run in running:
            run.read()
            key = run.key()
            kinds[key] = (run, kinds.get(key, (run, 0))[1] + 1)
        return list(kinds.values())

    def _close(self, run: StageRun) -> None:
        if run.told is not None:  # a pass begins, which must not wait for the device; after many it waits once
            self._unread.append(run)
            if len(self._unread) > MOST_UNREAD:
                self._read()
            return
        self._file(run)

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for run in unread:
            run.read()
            self._file(run)

    def _file(self, run: StageRun) -> None:
        key = run.key()
        self._totals[key] = (run, self._totals.get(key, (run, 0))[1] + 1)
