"""Text towers of dual encoders: the same surgery, with the token that the head reads anywhere in the row.

The end-of-text token moves as tokens leave, padding (where a mask hides it) differs from row to row, and the causal
mask must fit what is left. `Rows` keeps the books, as for language models; before the final norm the rows get their
original length back, so that hosts find the end-of-text token at its place.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment, Entry
from ...core.hooks import replaying
from ...core.ledger import Event, StageRun
from ...core.ledger import Group as Booked
from ...core.pictures import PAD, TEXT, Picture
from ...core.reduction import Reduction
from ...core.row_data import Group
from ...core.row_state import RowNotes, RowState
from ...core.rows import Rows
from ...core.sequence import Row
from ...core.signals import TOWER_SIGNALS, TowerTaps, tower_signals
from ...core.site import StageLayout
from ...core.threads import PerThread
from ...core.view import Signal, TokenView
from ...errors import PassError
from .. import hosts
from ..base import TextSpec, TowerSpec
from ..hosts import Arguments
from .vit_block import Tower
from .vit_pass import LayerRecord, Pass


@dataclass(frozen=True, eq=False)
class TextStep:
    """A cut of rows that can be taken again.

    Attributes:
        pieces: row `[G, 1]`, columns `[G, N]`, reduction and sizes of each group.
        source: int64 `[B, L']`, column of each new column's token.
    """

    pieces: list[tuple[Tensor, Tensor, Reduction, Tensor | None]]
    source: Tensor

    @property
    def kept(self) -> Tensor:
        """Place of each slot's own token, int64 `[B, L']`."""
        return self.source

    def __call__(self, x: Tensor) -> Tensor:
        """Takes the step again."""
        for at, columns, reduction, size in self.pieces:
            if reduction.merges or reduction.keep_weight is not None:
                merged, _ = reduction.apply(x[at, columns], size)
                x = x.index_put((at, columns.gather(1, reduction.keep)), merged)
        return x.gather(1, self.source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True, eq=False)
class GroupRow:
    """Where a group's tokens and protected tokens stand in rows without padding.

    Attributes:
        columns: int64 `[G, N]`.
        guards: int64 `[G, P]`, end of text first, inserted tokens last.
        length: L.
    """

    columns: Tensor
    guards: Tensor
    length: int

    @property
    def guarded(self) -> int:
        """P."""
        return self.guards.shape[1]

    def inner(self, x: Tensor, dim: int) -> Tensor:
        """The view's tokens along `dim`."""
        return _take(x, self.columns, dim)

    def guard(self, x: Tensor, dim: int) -> Tensor:
        """Protected tokens along `dim`."""
        return _take(x, self.guards, dim)


def _take(x: Tensor, columns: Tensor, dim: int) -> Tensor:
    dim %= x.dim()
    shape = [1] * x.dim()
    shape[0], shape[dim] = columns.shape
    target = list(x.shape)
    target[0], target[dim] = columns.shape
    return x.expand(columns.shape[0], *x.shape[1:]).gather(dim, columns.reshape(shape).expand(target))


@dataclass(eq=False)
class TextState:
    """What a forward through a text tower carries.

    Attributes:
        rows: the rows as they are.
        entered: columns that entered.
        end: int64 `[B]`, original column of the token that the head reads.
        inserted: tokens at the end of the rows that live for this block.
        cuts: cuts and inserts so far; masks are made once for each.
        outputs: per method, outputs of the tokens it inserted last, `[B, E, C]`.
        masks: attention masks made so far.
    """

    rows: Rows
    entered: int
    end: Tensor
    inserted: int = 0
    cuts: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the host's causal mask no longer fits."""
        return self.cuts > 0

    @property
    def row(self) -> Row:
        """The row, as far as the block hooks ask."""
        return Row(0, self.rows.length - self.inserted, self.inserted)

    @property
    def source(self) -> None:
        """Text towers keep no traces."""
        return None


@dataclass
class Given:
    """Token ids and mask of the call that a thread is in, or None."""

    ids: tuple[Tensor, Tensor | None] | None = None


class TextTower(Tower):
    """Drives one text tower."""

    masks = True

    def __init__(self, attachment: Attachment, spec: TextSpec) -> None:
        self.text = spec.end
        self.causal = spec.causal
        self.mask = spec.mask
        self.ids = Arguments(spec.ids, [hosts.IDS], [hosts.MASK])
        self.given = PerThread(Given)
        super().__init__(attachment, TowerSpec(spec.block, spec.blocks, 0, spec.width, spec.heads, stage="text"))
        if self.entries:
            self.normed = Arguments(spec.norm, [hosts.HIDDEN])
            attachment.hook(spec.ids, "pre", self.read)
            attachment.hook(spec.norm, "pre", self.restore)

    @staticmethod
    def text_layout(spec: TextSpec) -> StageLayout:
        """What a text tower offers to methods."""
        depth = len(spec.blocks)
        return StageLayout(
            depth, spec.width, spec.heads, depth - 1, frozenset({"start", "mid", "end"}), tower_signals(1)
        )

    # ------------------------------------------------------------------ hooks
    def read(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook where the ids come by."""
        ids = self.ids.get(hosts.IDS, args, kwargs)
        if isinstance(ids, Tensor) and not replaying():
            self.given.mine().ids = (ids.view(-1, ids.shape[-1]), self.ids.get(hosts.MASK, args, kwargs))

    def attend(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention pre-hook: a mask that fits the rows, with log(size) where a method wants it."""
        if self.reader.muted:
            return None
        again = replaying()
        record = (self._trained if again else self._pass).record(layer)
        x = self.attentions[layer].get(hosts.HIDDEN, args, kwargs)
        self._recognise(record, layer, x, again)
        if not again:
            record.taps["attn"] = module
            if self.block.q is None:
                record.taps["x"] = x
            size = self._pass.sequence.rows.size if layer >= self.proportional_from else None
            record.bias = None
            if self._pass.sequence.changed or size is not None:
                record.bias = self._mask(x.dtype, size)
        if record.bias is None:
            return None
        mask = record.bias
        if self.block.bias_rank == 2:  # nn.MultiheadAttention takes [L, L] or one for each row and head
            mask = (
                mask[0, 0] if mask.shape[0] == 1 else mask.repeat_interleave(getattr(module, self.block.heads), 0)[:, 0]
            )
        return self.attentions[layer].put(args, kwargs, {self.mask: mask})

    def restore(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the final norm: rows get their original length back."""
        current = self.running.mine().current
        if current is None or replaying() or not current.sequence.changed:
            return None
        state = current.sequence
        x = self.normed.get(hosts.HIDDEN, args, kwargs)
        return self.normed.put(args, kwargs, {hosts.HIDDEN: state.rows.restore(x, state.entered)})

    def _check_masks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Text towers get a causal mask, which `attend` makes anew."""

    # ------------------------------------------------------------------ passes
    def _begin(self, x: Tensor) -> None:
        mine = self.given.mine()
        given, mine.ids = mine.ids, None
        if given is None or given[0].shape != x.shape[:2]:
            raise PassError("the text tower ran without its token ids: call the model, not its blocks")
        self.running.mine().watch.begin()
        ids, mask = given
        batch, length = ids.shape
        end = self.text(ids)
        label = torch.zeros_like(ids)
        label[:, 0] = TEXT
        label = label.scatter(1, end[:, None], TEXT)
        valid = None if mask is None else mask.bool()
        lengths = [length] * batch
        if valid is not None:
            lengths = valid.sum(1).tolist()
            if min(lengths) == length:
                valid = None
            else:
                label = torch.where(valid, label, PAD)
        counts = (label == 0).sum(1).tolist()
        pictures = [Picture(row, 0, [], n=n, entered=n) for row, n in enumerate(counts)]
        place = torch.arange(length, device=ids.device).expand(batch, length)
        rows = Rows(batch, length, lengths, pictures, label, None, valid, place, torch.zeros_like(ids))
        run = self.attachment.ledger.begin(StageRun("text", batch, length))
        self._run(Pass(TextState(rows, length, end), run, grad=torch.is_grad_enabled()))

    def _mask(self, dtype: torch.dtype, size: Tensor | None) -> Tensor:
        """What is added to the logits, `[B or 1, 1, L, L]`."""
        state: TextState = self._pass.sequence
        rows, device = state.rows, state.end.device
        key = (state.cuts, state.inserted, size is not None)
        if key in state.masks:
            return state.masks[key]
        mask = torch.zeros(1, 1, rows.length, rows.length, dtype=dtype, device=device)
        low = torch.finfo(dtype).min
        if self.causal:
            mask = mask + torch.full((rows.length, rows.length), low, dtype=dtype, device=device).triu(1)
        if rows.valid is not None:
            mask = mask.masked_fill(~rows.valid[:, None, None, :], low)
        if size is not None:
            mask = mask + size.log().to(dtype)[:, None, None, :]
        state.masks[key] = mask.clamp(min=low)
        return state.masks[key]

    def notes(self, method: int, scope: str) -> MutableMapping[str, Any]:
        """What a method noted during the last forward, rows of all groups together."""
        notes = self._pass.sequence.rows.notes.get((method, scope), {})
        joined: dict[str, Any] = {}
        for name, by_row in notes.items():
            values = [by_row[unit] for unit in sorted(by_row)]
            joined[name] = torch.stack(values) if all(isinstance(v, Tensor) for v in values) else values[0]
        return joined

    # ------------------------------------------------------------------ cutting
    def _cut(self, entry: Entry, record: list[Any], x: Tensor, taps: TowerTaps, layer: int) -> Tensor:
        state: TextState = self._pass.sequence
        rows = state.rows
        before = rows.length
        pieces, booked = [], []
        for group in rows.groups("sample", by_length=True):
            reduction = self.attachment.decide(entry, self._group_view(entry, group, x, taps))
            slots = group.n if reduction is None else reduction.slots
            booked.append(Booked(len(group.units), group.n, slots, group.entered, 0, group.length))
            if reduction is not None:
                pieces.append((group, reduction))
        if pieces:
            again = [
                (g.index[:, None], g.columns, r, None if rows.size is None else rows.gather(rows.size, g))
                for g, r in pieces
            ]
            x, moved = rows.cut(x, pieces, renumber=False)
            record.append(TextStep(again, moved.source))
            state.cuts += 1
        kind = "cut" if pieces else "observe"
        ragged = any(reduction.valid is not None for _, reduction in pieces)
        event = Event("text", layer, entry.site.point, entry.index, kind, before, rows.length, tuple(booked), ragged)
        self.attachment.ledger.visit(self._pass.run, event)
        return x

    def _group_view(self, entry: Entry, group: Group, x: Tensor, taps: TowerTaps) -> TokenView:
        state: TextState = self._pass.sequence
        rows = state.rows
        columns = rows.relative(group, group.columns)
        row = GroupRow(columns, rows.relative(group, self._guards(group)), group.length)
        valid = rows.valid_columns(group)

        def local(t: Tensor, dim: int) -> Tensor:
            t = t[group.index] if t.shape[0] > 1 else t.expand(len(group.units), *t.shape[1:])
            return t if valid is None else _take(t, valid, dim)

        bias = taps.bias
        if bias is not None:
            bias = local(local(bias, 3), 2) if valid is None else _both(bias, group.index, valid)
        outputs = state.outputs.get(entry.index)
        here = TowerTaps(
            row,  # type: ignore[arg-type]
            local(x, 1),
            lambda: local(taps.q(), 2),
            lambda: local(taps.k(), 2),
            taps.scale,
            bias,
            None,
            None if outputs is None else outputs[group.index],
        )
        signals: dict[str, Signal] = {}
        for need in entry.needs:
            if need.name in TOWER_SIGNALS:
                signals[need.key] = partial(TOWER_SIGNALS[need.name].make, here)
            else:
                signals[need.key] = None
        view = TokenView(
            rows.gather(x.detach(), group),
            entry.site,
            size=None if rows.size is None else rows.gather(rows.size, group),
            depth=self.depth,
            entered=group.entered,
            columns=columns,
            signals=signals,
            state=RowState(rows, group, entry.index),
            row=RowNotes(rows, group, entry.index, entry.scope),
            memory=self.attachment.remember(entry.index),
        )
        self.attachment.bind_user(view, signals)
        return view

    def _guards(self, group: Group) -> Tensor:
        """Columns of end of text, start of text, and inserted tokens, int64 `[G, P]`."""
        state: TextState = self._pass.sequence
        place = state.rows.place[group.index]
        end = (place == state.end[group.index][:, None]).to(torch.int64).argmax(1, keepdim=True)
        start = (place == 0).to(torch.int64).argmax(1, keepdim=True)
        last = torch.arange(state.rows.length - state.inserted, state.rows.length, device=place.device)
        return torch.cat([end, start, last.expand(len(group.units), -1)], 1)

    def _insert(self, entry: Entry, record: LayerRecord, x: Tensor, taps: TowerTaps) -> Tensor:
        state: TextState = self._pass.sequence
        rows = state.rows
        tokens: Tensor | None = None
        for group in rows.groups("sample", by_length=True):
            made = entry.method.insert(self._group_view(entry, group, x, taps))
            if made is None or made.shape[1] == 0:
                return x
            if tokens is None:
                tokens = made.new_zeros(x.shape[0], *made.shape[1:])
            tokens = tokens.index_put((group.index,), made)
        if tokens is None:
            return x
        before, count = rows.length, tokens.shape[1]
        tokens = tokens.to(x.dtype)
        rows.append(count)
        state.inserted += count
        state.cuts += 1
        record.taps.setdefault("owners", []).append((entry.index, count))
        record.start.append(tokens)
        record.inserted += count
        event = Event("text", entry.site.layer, "start", entry.index, "insert", before, rows.length)
        self.attachment.ledger.visit(self._pass.run, event)
        return torch.cat([x, tokens], 1)

    def _take_off(self, record: LayerRecord, out: Tensor) -> Tensor:
        state: TextState = self._pass.sequence
        place = at = state.rows.length - state.inserted
        for index, count in record.taps.get("owners", ()):
            state.outputs[index] = out[:, place : place + count]
            place += count
        state.rows.discard(state.inserted)
        state.inserted = 0
        return out[:, :at]

    # ------------------------------------------------------------------ taps
    def _bias(self, x: Tensor, layer: int, record: LayerRecord | None = None) -> Tensor | None:
        return self._mask(x.dtype, self._pass.sequence.rows.size if layer >= self.proportional_from else None)

    def _carry(self, layer: int, taps: TowerTaps) -> None:
        """Text towers hand no signals to later sites."""

    def _carry_outputs(self, layer: int, out: Tensor) -> None:
        """Text towers hand no signals to later sites."""


def _both(bias: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """`[B or 1, 1, L, L]` at valid rows and columns of a group."""
    picked = bias[index] if bias.shape[0] > 1 else bias.expand(len(index), *bias.shape[1:])
    return _take(_take(picked, valid, 2), valid, 3)
