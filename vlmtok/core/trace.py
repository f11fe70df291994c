"""`Trace`: which patch went where in the last pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ParameterError, PassError
from ..sheet import Sheet, Shown
from ..tabular import Table
from .site import Site

if TYPE_CHECKING:
    from .attachment import Attachment


MOST = 6
"""Pictures of a pass that a table shows one by one."""


@dataclass(frozen=True, eq=False)
class PictureTrace(Shown):
    """One picture's patches.

    Attributes:
        owner: int64 `[patches]`, slot that owns each patch at the end of the pass, -1 where it was dropped. Patches of
            one slot were merged; slots are numbered by their first patch.
        steps: after each cut, in order: where it was, and the owners then.
        grid: rows and columns of the patches (of each part, where parts are equally large), or None where they form no
            single grid.
        parts: int64 `[patches]`, 0 thumbnail or only picture, 1.. crops or frames, -1 separators; None for all 0.
        video: whether it is a clip, whose parts are frames.
        shapes: rows and columns of single parts, where they differ.
        slots: of a tower alone, with each step, int64 `[patches]`: the token behind the protected ones that holds each
            patch, -1 where it was dropped.
        prefix: protected tokens in front of them.
        methods: with each step, the name of the method that cut; empty where it was not recorded.
        cached: fp32 `[decoder layers, patches]`, share of the key-value heads in whose cache of that layer the patch's
            entry is held behind the prefill, alone or in an entry that it joined: 0 where it left there or did not
            reach the layer, NaN where a layer keeps no entries of its own. None where nothing acts on caches.
        cached_by: names of the methods that act on caches.
    """

    owner: Tensor
    steps: tuple[tuple[Site, Tensor], ...]
    grid: tuple[int, int] | None
    parts: Tensor | None = None
    video: bool = False
    shapes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    slots: tuple[Tensor, ...] = ()
    prefix: int = 0
    methods: tuple[str, ...] = ()
    cached: Tensor | None = None
    cached_by: tuple[str, ...] = ()

    def grids(self) -> dict[int, tuple[tuple[int, int], Tensor]]:
        """Grids of the picture's parts.

        Returns:
            By part: rows and columns, and the patches row by row, int64 `[rows * columns]`. Parts that are no grid are
            left out.
        """
        if self.parts is None:
            return {} if self.grid is None else {0: (self.grid, torch.arange(self.patches))}
        found: dict[int, tuple[tuple[int, int], Tensor]] = {}
        for part in self.parts[self.parts >= 0].unique().tolist():
            at = (self.parts == part).nonzero()[:, 0]
            shape = self._lines(at) if part and self._on_canvas else self._shape(part, len(at))
            if shape is not None:
                found[part] = (shape, at)
        return found

    def _shape(self, part: int, n: int) -> tuple[int, int] | None:
        for shape in (self.shapes.get(part), self.grid):
            if shape is not None and shape[0] * shape[1] == n:
                return shape
        side = math.isqrt(n)
        return (side, side) if side * side == n else None

    @property
    def canvas(self) -> tuple[tuple[int, int], Tensor] | None:
        """The whole picture in fine patches, where crops lie on one canvas with a separator behind each of its rows.

        Rows and columns, and the patches of all crops row by row, int64 `[rows * columns]`; None where there is none.
        """
        if not self._on_canvas or self.parts is None:
            return None
        at = (self.parts > 0).nonzero()[:, 0]
        shape = self._lines(at)
        return None if shape is None else (shape, at)

    def place(self, part: int) -> tuple[int, int, int, int] | None:
        """Where a crop lies on the canvas: first row and column, and those behind the last; None where it does not."""
        whole, crop = self.canvas, self.grids().get(part)
        if whole is None or crop is None or not part:
            return None
        (_, columns), patches = whole
        (high, wide), own = crop
        row, column = divmod(int((patches == own[0]).nonzero()[0]), columns)
        return row, column, row + high, column + wide

    @property
    def _on_canvas(self) -> bool:
        """Whether separators stand behind rows of crops; behind frames, one ends the clip."""
        return not self.video and self.parts is not None and bool((self.parts < 0).any() and (self.parts > 0).any())

    def _lines(self, at: Tensor) -> tuple[int, int] | None:
        """Rows and columns of some patches of the canvas, by the separators that stand before them."""
        assert self.parts is not None
        rows = int((self.parts < 0).cumsum(0)[at].unique().numel())
        return (rows, len(at) // rows) if len(at) % rows == 0 else None

    @property
    def patches(self) -> int:
        """How many there were."""
        return int(self.owner.shape[0])

    @property
    def kept(self) -> int:
        """Slots that are left."""
        return int(self.owner[self.owner >= 0].unique().numel())

    def left(self) -> list[tuple[str, int, int]]:
        """By step: the site, tokens that are left behind it, and patches that are dropped by then."""
        return [
            (str(site), int(owner[owner >= 0].unique().numel()), int((owner < 0).sum())) for site, owner in self.steps
        ]

    def held_in(self) -> Tensor:
        """In how many layers each patch's entry is held, fp32 `[patches]`; heads count by their share.

        Raises:
            ParameterError: nothing acted on the key-value cache.
        """
        if self.cached is None:
            raise ParameterError("held_in() tells of key-value caches; no method acted on one, and no cut forgets")
        return self.cached.nansum(0)

    def sheet(self) -> Sheet:
        """What was left behind each cut."""
        rows = [["all", str(self.patches), "0", "0"]]
        rows += [
            [site, str(tokens), str(self.patches - gone - tokens), str(gone)] for site, tokens, gone in self.left()
        ]
        table = Table(["behind", "tokens", "merged away", "patches dropped"], rows)
        return Sheet(self._title(), lines=_cached([self]), tables=[table])

    def _title(self) -> str:
        grid = "" if self.grid is None else f" on a grid of {self.grid[0]} x {self.grid[1]}"
        cuts = f"{len(self.steps)} cut{'s' if len(self.steps) != 1 else ''}"
        return f"{self.kept} tokens left of {self.patches} patches{grid}, {cuts}"

    def __repr__(self) -> str:
        return f"<PictureTrace: {'; '.join([self._title(), *_cached([self])])}>"

    def group_sizes(self) -> Tensor:
        """Patches of each patch's slot, int64 `[patches]`; 0 where it was dropped."""
        counts = torch.bincount(self.owner.clamp(min=0)[self.owner >= 0], minlength=self.patches)
        return torch.where(self.owner >= 0, counts[self.owner.clamp(min=0)], 0)

    def dropped_at(self) -> list[Site | None]:
        """For each patch, the site that dropped it; None where it is left."""
        found: list[Site | None] = [None] * self.patches
        for site, owner in self.steps:
            for patch in (owner < 0).nonzero()[:, 0].tolist():
                if found[patch] is None:
                    found[patch] = site
        return found

    def unmerge(self, slots: Tensor) -> Tensor:
        """Spreads values of slots over the patches.

        Args:
            slots: `[kept, ...]`, one row for each slot, in the order in which slots first appear among the patches.

        Returns:
            `[patches, ...]`, zeros where a patch was dropped.
        """
        order = self.owner[self.owner >= 0].unique()
        if slots.shape[0] != order.numel():
            raise ParameterError(f"unmerge needs one row for each of the {order.numel()} slots, got {slots.shape[0]}")
        rank = torch.full((self.patches,), -1)
        rank[order] = torch.arange(order.numel())
        at = torch.where(self.owner >= 0, rank[self.owner.clamp(min=0)], -1)
        spread = slots[at.clamp(min=0).to(slots.device)]
        return spread * (at >= 0).to(spread).reshape(-1, *[1] * (spread.dim() - 1))

    def restore(self, rows: Tensor, layer: int | None = None) -> Tensor:
        """Brings a row that a tower alone recorded back to the grid it came from.

        A compressed tower's outputs are rows as its cuts left them: hidden state i + 1 as block i gave it, the last
        one and everything behind it as the last block did.

        Args:
            rows: `[L, C]`, what a block gave for this picture, protected tokens in front.
            layer: the block, 0-based; None for the last.

        Returns:
            `[patches, C]`: every patch has its slot's row, zeros where it was dropped.

        Raises:
            ParameterError: the picture is one of a language model, or the row is none of that layer.
        """
        if len(self.slots) != len(self.steps):
            raise ParameterError("restore() takes rows of a tower that was compressed alone, not of a language model")
        at = [i for i, (site, _) in enumerate(self.steps) if layer is None or (site.layer or 0) <= layer]
        slots = self.slots[at[-1]] if at else torch.arange(self.patches)
        count = int(slots.max()) + 1
        if rows.dim() != 2 or not count <= rows.shape[0] <= count + self.prefix:
            raise ParameterError(
                f"behind {'the last block' if layer is None else f'block {layer}'} a row has {count} tokens and "
                f"{self.prefix} protected ones; got {list(rows.shape)}"
            )
        tokens = rows[rows.shape[0] - count :]
        found = tokens[slots.clamp(min=0).to(rows.device)]
        return found * (slots >= 0).to(found)[:, None]


class Trace(Shown):
    """The pictures of the last pass.

    Attributes:
        pictures: in the order of the batch, and within a prompt in its order.
        notes: what their tokens do not tell.
    """

    def __init__(self, pictures: list[PictureTrace], notes: tuple[str, ...] = ()) -> None:
        self.pictures = pictures
        self.notes = notes

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> PictureTrace:
        return self.pictures[index]

    def sheet(self) -> Sheet:
        """What was left behind each cut, picture by picture; of many pictures the least and the most."""
        if len(self) == 1:
            return replace(self[0].sheet(), notes=self.notes)
        by_site: dict[str, dict[int, int]] = {"all": {i: picture.patches for i, picture in enumerate(self.pictures)}}
        for i, picture in enumerate(self.pictures):
            for site, tokens, _ in picture.left():
                by_site.setdefault(site, {})[i] = tokens
        title = f"{len(self)} pictures: {sum(p.kept for p in self.pictures)} tokens left of "
        title += f"{sum(p.patches for p in self.pictures)} patches"
        if len(self) > MOST:
            rows = [[s, str(min(left.values())), str(max(left.values()))] for s, left in by_site.items()]
            table = Table(["behind", "tokens, least", "tokens, most"], rows)
            return Sheet(title, _cached(self.pictures), [table], self.notes)
        rows = [[s, *(str(left.get(i, "")) for i in range(len(self)))] for s, left in by_site.items()]
        head = ["behind", *(f"tokens of picture {i}" for i in range(len(self)))]
        return Sheet(title, _cached(self.pictures), [Table(head, rows)], self.notes)

    def __repr__(self) -> str:
        many = f"{len(self)} picture{'s' if len(self) != 1 else ''}"
        kept = ", ".join(f"{p.kept} of {p.patches}" for p in self.pictures)
        return f"<Trace of {many}: {'; '.join([kept, *_cached(self.pictures)])}>"

    __str__ = __repr__  # a picture of it prints its table

    @classmethod
    def of(cls, attachment: Attachment) -> Trace:
        """Reads what the drivers of an attachment recorded.

        Raises:
            ParameterError: nothing is recorded without ``trace=True``.
            PassError: no pass has run.
        """
        if not attachment.trace:
            raise ParameterError("traces are kept only with vlmtok.compress(model, method, trace=True)")
        tower, decoder = attachment.drivers.get("vision"), attachment.drivers.get("decoder")
        if decoder is not None and decoder.running.seen().last_rows is not None:
            return cls(_language(tower, decoder), _unseen(tower))
        if decoder is None and tower is not None and tower.current is not None:
            return cls(_tower(tower))
        raise PassError("no pass has run yet: call the model first")


def _cached(pictures: Sequence[PictureTrace]) -> list[str]:
    """What caches hold of the patches of some pictures, in one line; nothing where nothing acted on them."""
    tables = [picture.cached for picture in pictures if picture.cached is not None]
    if not tables or len(tables) < len(pictures):
        return []
    by_layer = torch.stack([table.sum(1) for table in tables]).sum(0)  # NaN where no entries are kept
    by_layer = by_layer[~by_layer.isnan()]
    patches, layers = sum(table.shape[1] for table in tables), len(by_layer)
    if not layers:
        return []
    total, least, most = (_number(float(x)) for x in (by_layer.sum(), by_layer.min(), by_layer.max()))
    span = least if least == most else f"{least} to {most}"
    where = f"{span} of {patches:,} patches in each of {layers} layers"
    return [f"key-value caches behind the prefill: {where}, {total} of {patches * layers:,} together"]


def _number(value: float) -> str:
    """With tenths where heads hold different ones."""
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def _unseen(tower: Any) -> tuple[str, ...]:
    """That a tower merged patches and spread them again, which visual tokens do not show."""
    if tower is None or tower.current is None or not tower.returns_grid or not tower.current.steps:
        return ()
    names = ", ".join(dict.fromkeys(method.spec_name() for *_, method in tower.current.steps))
    return (
        f"what {names} joined inside the vision tower is not shown: every patch has its slot's features again behind "
        "it, and these are the visual tokens that are made of patches; report() tells the tower's tokens by block",
    )


def _first_patch(owner: Tensor) -> Tensor:
    """Renumbers slots by their first patch."""
    patches = owner.shape[0]
    place = torch.arange(patches)
    first = torch.full((int(owner.max()) + 2,), patches).scatter_reduce(0, owner + 1, place, "amin")
    return torch.where(owner < 0, -1, first[owner + 1])


def _tower(tower: Any) -> list[PictureTrace]:
    run = tower.current
    source = run.sequence.source.cpu()
    grid = run.grid
    steps = [(site, owner.cpu()) for site, owner, _ in run.steps]
    methods = tuple(method.spec_name() for *_, method in run.steps)
    return [
        PictureTrace(
            _first_patch(source[i]),
            tuple((site, _first_patch(owner[i])) for site, owner in steps),
            grid,
            slots=tuple(owner[i] for _, owner in steps),
            prefix=tower.num_prefix,
            methods=methods,
        )
        for i in range(source.shape[0])
    ]


def _language(tower: Any, decoder: Any) -> list[PictureTrace]:
    """Tower first, then the language model's columns."""
    running, handover = decoder.running.seen(), decoder.projector.handover
    rows = running.last_rows
    before = _tower(tower) if tower is not None and tower.current is not None and handover is not None else None
    sources = None if before is None else tower.current.sequence.source.cpu()
    found = []
    for picture in rows.pictures:
        columns = torch.tensor(picture.columns)
        slot = torch.arange(len(columns))
        steps: list[tuple[Site, Tensor]] = []
        methods: tuple[str, ...] = ()
        if before is not None and sources is not None:
            slot = sources[picture.tower]
            if handover.valid is not None:
                real = handover.valid[picture.tower].cpu()
                slot = torch.where((slot >= 0) & real[slot.clamp(min=0)], slot, -1)
            steps += before[picture.tower].steps
            methods = before[picture.tower].methods

        def entries(table: Tensor, slot: Tensor = slot, columns: Tensor = columns, row: int = picture.row) -> Tensor:
            there = table[:, row].cpu()[:, columns]
            return torch.where((slot >= 0) | there[:, :1].isnan(), there[:, slot.clamp(min=0)], 0.0)

        def at(owner: Tensor, slot: Tensor = slot, columns: Tensor = columns, row: int = picture.row) -> Tensor:
            there = owner[row].cpu()[columns]
            return _first_patch(torch.where(slot >= 0, there[slot.clamp(min=0)], -1))

        steps += [(site, at(owner)) for site, owner, _ in running.steps]
        methods += tuple(method.spec_name() for *_, method in running.steps)
        parts = None if rows.first_part is None else rows.first_part[picture.row].cpu()[columns]
        grid = picture.grid
        if before is not None and before[picture.tower].patches == len(slot):
            grid = before[picture.tower].grid
        if grid is None and decoder.tower_grid and decoder.tower_grid[0] * decoder.tower_grid[1] == len(slot):
            grid = decoder.tower_grid
        cached = None if running.cached is None else entries(running.cached)
        by = () if cached is None else decoder.evictor.names
        made = PictureTrace(at(rows.owner), tuple(steps), grid, parts, picture.video, methods=methods)
        found.append(replace(made, cached=cached, cached_by=by))
    return found
