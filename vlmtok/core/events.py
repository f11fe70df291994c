"""What happened in a pass, as host ints: visits of methods, work left out, attention summed, decode steps."""

from __future__ import annotations

from dataclasses import dataclass

from .site import layer_of


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
        mixed: whether some of that text stands before some of the view's tokens.
        frames: frames of a clip that each is; 0 where it is none.
        cells: tokens of each frame while they are whole; else 0.
    """

    rows: int
    n: int
    slots: int
    entered: int
    text: int = 0
    length: int = 0
    mixed: bool = False
    frames: int = 0
    cells: int = 0


@dataclass(frozen=True)
class Event:
    """One visit of a method to a site.

    Attributes:
        stage: of the site.
        layer: of the site, or None.
        point: of the site.
        method: index of the method in its list.
        kind: ``cut``, ``observe`` (nothing reduced), ``insert``, or ``forget`` (at ``cache``: entries that left the
            caches of layers before a cut of the method, with the tokens that it dropped).
        before: tokens of a whole row before, padding included; at ``cache`` entries of a row that the layer held, past
            included.
        after: the same after.
        groups: the batched calls.
        ragged: whether the rows may differ in what they keep.
        gone: tokens that left all rows together, where `ragged` and known; padded lengths do not tell. At ``cache``
            entries of each head.
        written: at ``cache``, tokens of a row that were written behind the pass when they left; 0 right behind it.
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
    gone: int | None = None
    written: int = 0

    @property
    def reaches(self) -> int | None:
        """The first layer of a language model that gets the row as it left it; None at ``cache``: no row changes."""
        if self.stage == "cache":
            return None
        return layer_of(self.layer, self.point) if self.stage == "decoder" else 0


@dataclass(frozen=True)
class Skip:
    """Work of a decoder layer that was left out for visual tokens.

    Attributes:
        layer: 0-based.
        module: which one, of `vlmtok.core.skipping`.
        tokens: of all rows together, for which it did not run.
    """

    layer: int
    module: str
    tokens: int


@dataclass(frozen=True)
class Mass:
    """Attention that entries of a layer received, summed for a method at its cache.

    Attributes:
        layer: 0-based.
        rows: rows of the batch.
        queries: rows of each whose attention was summed.
        keys: that the layer saw, past and padding included.
    """

    layer: int
    rows: int
    queries: int
    keys: int


@dataclass
class Decoding:
    """Decode steps of so many rows, one token each, behind a call of the language model.

    Attributes:
        rows: rows of each step.
        first: tokens that joined the caches since the call, before these steps; negative where a host took some off.
        steps: how many.
        head: rows that the language model's head saw in all of them.
        recorded: whether the cache kept what it could drop, for drafts that are taken back.
    """

    rows: int
    first: int = 0
    steps: int = 0
    head: int = 0
    recorded: bool = False
