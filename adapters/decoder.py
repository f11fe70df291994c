"""Cuts at a language model's boundary and between its layers, driven by `VLMSpec`.

Placeholders and their scatter happen as always; a pre-hook on the text model shortens embeddings, positions and mask.
Pre-hooks on the layers from the first cut on shorten hidden states once, and give every later layer its own rotary
embeddings and mask, since hosts hand all layers the same ones. `generate()` is untouched.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..attachment import Attachment, Entry, replaying, weak
from ..errors import CacheError, PassError, UnsupportedModel
from ..ledger import Event, StageRun
from ..ledger import Group as Booked
from ..method import Site, StageLayout
from ..rows import PAD, TEXT, Group, Moved, Picture, RowNotes, Rows, RowState
from ..signals import DECODER_SIGNALS, DecoderTaps, Need
from ..stream import ATTRIBUTE, Segment, Stream, file_stream, read_stream, ticket
from ..view import Signal, TokenView
from .base import VLMSpec, child
from .handover import Handover, Projector

BY_TEXT = frozenset({"text", "text_attention", "attention_to_text"})
BY_LENGTH = frozenset({"text_attention", "attention_to_text", "last_attention", "attention_logits", "transition"})


@dataclass
class Incoming:
    """What the inner model was called with; the text model sees only part of it.

    Attributes:
        visual: bool `[B, S]`, placeholder columns, or None where the call brings no features.
        mask: `[B, past + S]`, or None.
        lengths: tokens of each picture, in the order of the placeholders, or None.
    """

    visual: Tensor | None
    mask: Tensor | None
    lengths: list[int] | None


@dataclass
class SegmentCall:
    """One segment during one call.

    Attributes:
        rotary: position embeddings of its rows.
        masks: attention masks, by layer type.
        valid: bool `[B, past + L]`, or None.
    """

    rotary: Any
    valid: Tensor | None
    masks: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """One forward of the text model.

    Attributes:
        cache: the cache of this call, or None.
        stream: the past, or None where nothing was cut yet.
        rows: the rows of a prefill with pictures, or None.
        columns: S.
        run: the books.
        added: what this call adds to the caches of each segment: (columns, validity) by first layer.
        segments: by first layer.
        positions: int64 `[..., B, S]` as the host counts, of a call without pictures.
        past: columns cached before the call at layer 0.
        taps: per layer, what hooks caught.
        moved: whether the boundary changed the rows.
        next: int64 `[B]`, position of the token behind this call, as the host counts.
        lowered: int64 `[B]`, how far renumbering cuts of this call lowered positions so far, or None.
        shifts: the same by segment, where it was known to hold.
    """

    cache: Any
    stream: Stream | None
    rows: Rows | None
    columns: int
    run: StageRun | None
    positions: Tensor | None = None
    past: int = 0
    added: dict[int, tuple[int, Tensor | None]] = field(default_factory=dict)
    segments: dict[int, SegmentCall] = field(default_factory=dict)
    taps: dict[int, dict[str, Any]] = field(default_factory=dict)
    moved: bool = False
    next: Tensor | None = None
    lowered: Tensor | None = None
    shifts: dict[int, Tensor | None] = field(default_factory=dict)


class Decoder:
    """Drives one language model."""

    def __init__(
        self,
        attachment: Attachment,
        spec: VLMSpec,
        core: nn.Module,
        tower: Any = None,
        tower_grid: tuple[int, int] | None = None,
    ) -> None:
        self.attachment = attachment
        self.spec = spec
        lm = child(core, spec.lm)
        self.lm = weak(lm)
        self.core_signature = inspect.signature(type(core).forward)
        self.depth = len(lm.layers)
        self.ids = [
            int(getattr(core.config, name)) for name in spec.ids if getattr(core.config, name, None) is not None
        ]
        self.kinds = layer_kinds(lm.config, self.depth)
        self.owner = ticket()
        self.incoming: Incoming | None = None
        self.call: Call | None = None
        self.muted = False
        self.last_rows: Rows | None = None
        self.steps: list[tuple[Site, Tensor]] = []
        self.tower = tower
        self.tower_grid = tower_grid
        self.projector = Projector(attachment, spec, tower)
        self.points: dict[int, list[Entry]] = {}
        for entry in attachment.at("decoder"):
            layer = entry.site.layer or 0
            self.points.setdefault(layer + (entry.site.point == "end"), []).append(entry)
        self.projected = attachment.at("projected")
        self._install(core, lm)

    # ------------------------------------------------------------------ layout and hooks
    @staticmethod
    def layout(lm: nn.Module) -> dict[str, StageLayout]:
        """What a text model offers to methods."""
        config = lm.config
        depth, width, heads = len(lm.layers), int(config.hidden_size), int(config.num_attention_heads)
        return {
            "projected": StageLayout(1, width, 0, 0, provides=frozenset({"text"})),
            "decoder": StageLayout(
                depth, width, heads, depth - 1, frozenset({"start", "end"}), frozenset(DECODER_SIGNALS)
            ),
        }

    def _install(self, core: nn.Module, lm: nn.Module) -> None:
        put = self.attachment.hook
        implementation = str(getattr(lm.config, "_attn_implementation", ""))
        if self.points and implementation not in ("sdpa", "eager", "flash_attention_2", "flash_attention_3"):
            raise UnsupportedModel(
                f"cuts inside the language model are known with sdpa, eager and flash attention, not {implementation!r}"
            )
        self.flash = "flash" in implementation
        self.projector.install(core)
        put(core, "pre", self.enter)
        put(lm, "pre", self.start)
        put(lm, "post", self.finish)
        first = 0 if self.flash else min(self.points, default=self.depth)
        for layer in range(first, self.depth):
            put(lm.layers[layer], "pre", self.layer, layer)
        for cut, entries in self.points.items():
            needs = {need.name for e in entries if e.site.point == "end" for need in e.needs}
            if not needs:
                continue
            block = lm.layers[cut - 1]
            if needs - {"transition"}:
                put(block.self_attn, "pre", self.tap_attention, cut - 1)
                put(projection(block.self_attn, "q"), "post", self.tap_q, cut - 1)
                put(projection(block.self_attn, "k"), "post", self.tap_k, cut - 1)
            if "transition" in needs:
                put(block.self_attn, "post", self.tap_transition, cut - 1)
                put(block.mlp, "post", self.tap_transition, cut - 1)

    # ------------------------------------------------------------------ the inner model
    def enter(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Core pre-hook: where the pictures are; placeholders count only where features come along."""
        given = self.core_signature.bind(module, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        encoded = given.get("mm_encoder_outputs") or {}
        features = [encoded.get(kind) for kind in ("image", "video") if encoded.get(kind) is not None]
        pixels = given.get("pixel_values") is not None or given.get("pixel_values_videos") is not None
        visual, lengths = None, None
        if features or pixels:
            ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
            if ids is not None:
                visual = torch.isin(ids, torch.tensor(self.ids, device=ids.device))
            elif embeds is not None:
                table = module.get_input_embeddings()
                wanted = table(torch.tensor(self.ids, device=embeds.device)).to(embeds.dtype)
                visual = (embeds[:, :, None] == wanted).all(-1).any(-1)
            if features and getattr(features[0], "pooler_output", None) is not None:
                lengths = [len(part) for feature in features for part in feature.pooler_output]
        self.incoming = Incoming(visual, given.get("attention_mask"), lengths)

    # ------------------------------------------------------------------ the text model
    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Text-model pre-hook: the boundary cut, positions, the mask of the first segment."""
        incoming, self.incoming = self.incoming, None
        self.call = None
        x, mask, cache = kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if x is None:
            return None
        batch, columns = x.shape[:2]
        held = 0 if cache is None else int(cache.get_seq_length())
        stream = read_stream(cache, self.owner, batch, held)
        visual = incoming.visual if incoming is not None and incoming.visual is not None else None
        pictures: list[Picture] = []
        if visual is not None:
            self._refuse(mask, cache)
            pictures, valid = self._pictures(visual, mask, columns, incoming.lengths if incoming else None)
        if not pictures and stream is None:
            self._book(batch, columns, held, 0, cache)
            return None
        self._refuse(mask, cache)
        positions = kwargs.get("position_ids")
        if positions is not None and positions.shape[-2] != batch:
            positions = positions.expand(*positions.shape[:-2], batch, -1)
        if stream is not None:
            self._check_turn(stream, columns, mask, positions)
        if positions is None:
            begin = torch.full((batch,), held, device=x.device) if stream is None else stream.next
            assert begin is not None
            positions = begin[:, None] + torch.arange(columns, device=x.device)
        run = self._book(batch, columns, held, len(pictures), cache)
        if stream is None and held:
            stream = self._past(batch, held, mask)
        call = Call(cache, stream, None, columns, run, positions, held)
        call.next = (positions if positions.dim() == 2 else positions[-3:].amax(0)).amax(-1) + 1
        self.call = call
        if pictures:
            below = None if stream is None else stream.segments[0].shift
            call.rows = self._rows(x, pictures, valid, positions if below is None else positions - below[:, None])
            x = self._boundary(call, x)
            call.added[0] = (x.shape[1], call.rows.valid)
        elif stream is not None:
            padded = mask is not None and (columns > 1 or stream.segments[0].valid is not None)
            call.added[0] = (columns, mask[:, -columns:].bool() if padded and mask is not None else None)
        call.shifts[0] = call.lowered
        if not call.moved and (stream is None or not hasattr(cache, ATTRIBUTE)):
            return None  # nothing differs from what the host does by itself, so far
        return args, self._first_segment(call, x, kwargs)

    def _first_segment(self, call: Call, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Embeddings, positions and the 2-D mask that the text model gets."""
        if call.stream is None:
            call.stream = Stream(self.owner, x.shape[0], segments={0: Segment(0)})
        segment = call.stream.segments[0]
        if call.rows is not None:
            positions = call.rows.positions
        else:
            assert call.positions is not None
            positions = call.positions if segment.shift is None else call.positions - segment.shift[:, None]
        valid = segment.extended(*call.added[0], x.shape[0], x.device)
        mask: Tensor | None
        if valid is not None:
            mask = valid.to(torch.int64)
        elif call.cache is not None:
            mask = None
        else:
            # Without a cache, position gaps and no mask read as packed sequences: say that all columns are one.
            mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        return {**kwargs, "inputs_embeds": x, "position_ids": positions, "attention_mask": mask}

    def _refuse(self, mask: Any, cache: Any) -> None:
        """Says what cannot work, before anything is changed."""
        kind = type(cache).__name__
        if cache is not None and ("Static" in kind or getattr(cache, "is_compileable", False)):
            raise CacheError(
                f"{kind} holds all layers at one fixed length, which a cut breaks; use the default cache "
                "(leave cache_implementation out)"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            what = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
            raise CacheError(f"a cut needs the 2-D attention mask, and the language model got a {what} one")

    def _check_turn(self, stream: Stream, columns: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """A call on a filled cache must bring new tokens only.

        Hosts slice full ids by the length of the cache, which a cut made shorter: tokens would be fed twice.
        """
        advice = (
            "pass only the new ids, and an attention_mask of the full length (all turns, pictures uncut); full ids are "
            "sliced by the length of the cut cache, which feeds tokens twice"
        )
        if mask is not None and mask.shape[1] != stream.seen + columns:
            raise CacheError(
                f"the cache has seen {stream.seen} columns and this call brings {columns}, but the attention mask has "
                f"{mask.shape[1]}: {advice}"
            )
        if columns > 1 and positions is not None and stream.next is not None:
            text = positions if positions.dim() == 2 else positions[0]
            first = text[:, 0] if mask is None else text.gather(1, mask[:, -columns:].argmax(1, keepdim=True))[:, 0]
            if not bool((first == stream.next).all()):
                raise CacheError(
                    f"the next position is {stream.next.tolist()}, but this call starts at {first.tolist()}: {advice}"
                )

    def _past(self, batch: int, held: int, mask: Tensor | None) -> Stream:
        """The past of a cache that was filled without a cut."""
        stream = Stream(self.owner, batch, seen=held, segments={0: Segment(0, held)})
        if mask is not None:
            stream.segments[0].valid = mask[:, :held].bool()
        return stream

    def _book(self, batch: int, columns: int, held: int, pictures: int, cache: Any) -> StageRun | None:
        ledger = self.attachment.ledger
        if columns == 1 and held:
            ledger.step(batch)
            return None
        return ledger.begin(StageRun("decoder", batch, columns, held, pictures, cache is not None))

    # ------------------------------------------------------------------ rows
    def _pictures(
        self, visual: Tensor, mask: Tensor | None, columns: int, lengths: list[int] | None
    ) -> tuple[list[Picture], Tensor | None]:
        """Finds the pictures of a call; the one read-back of a prefill."""
        valid = None if mask is None else mask[:, -columns:].bool()
        both = visual if valid is None else torch.stack([visual, valid])
        host = both.cpu().tolist()
        seen, real = (host, None) if valid is None else host
        if valid is not None and all(map(all, real)):
            valid = None
        total = sum(map(sum, seen))
        lengths = self.projector.lengths(lengths, total)
        pictures = find_pictures(seen, lengths)
        self._text_after(pictures, seen, real)
        self.projector.number(pictures)
        return pictures, valid

    @staticmethod
    def _text_after(pictures: list[Picture], seen: list[list[bool]], real: list[list[bool]] | None) -> None:
        for picture in pictures:
            row = seen[picture.row]
            text = [not v and (real is None or real[picture.row][c]) for c, v in enumerate(row)]
            picture.text_after = sum(text[picture.columns[0] :])
            picture.text_after_last = sum(text[picture.columns[-1] :])
            picture.n = len(picture.columns)

    def _rows(self, x: Tensor, pictures: list[Picture], valid: Tensor | None, positions: Tensor) -> Rows:
        batch, columns = x.shape[:2]
        label = torch.full((batch, columns), TEXT)
        part = torch.zeros(batch, columns, dtype=torch.int64) if any(p.parts for p in pictures) else None
        for picture in pictures:
            label[picture.row, picture.columns] = picture.index
            if part is not None and picture.parts is not None:
                part[picture.row, picture.columns] = torch.tensor(picture.parts)
        label = label.to(x.device)
        lengths = [columns] * batch
        if valid is not None:
            label = torch.where(valid, label, PAD)
            lengths = valid.sum(1).tolist()
        place = torch.arange(columns, device=x.device).expand(batch, columns)
        rows = Rows(
            batch,
            columns,
            lengths,
            pictures,
            label,
            None if part is None else part.to(x.device),
            valid,
            place,
            positions,
        )
        self.steps = []
        if self.attachment.trace:
            rows.owner = place.clone()
        return rows

    def _boundary(self, call: Call, x: Tensor) -> Tensor:
        """What the tower and the projector left out goes, then methods act on the language model's input."""
        rows = call.rows
        assert rows is not None and call.run is not None
        before = x
        handover = self.projector.handover
        if handover is not None:
            x = self._hand_over(call, handover, x)
        rows.enter()
        for entry in self.projected:
            x, _ = self._visit(call, entry, x, None, renumber_by_default=self.spec.positions == "1d")
        call.moved = x is not before
        if self.points:
            rows.enter(hold=True)
        self.last_rows = rows if self.attachment.trace else None
        return x

    def _hand_over(self, call: Call, handover: Handover, x: Tensor) -> Tensor:
        """Placeholders that the tower's cuts emptied leave; what travels with the rest comes along."""
        rows = call.rows
        assert rows is not None and call.run is not None
        pieces = []
        for group in rows.groups("picture"):
            index = torch.tensor([self._picture(rows, unit).tower for unit in group.units], device=x.device)
            reduction = handover.reduction(index, group.n)
            if reduction is not None:
                pieces.append((group, reduction))
        if pieces:
            before = rows.length
            renumber = self.spec.positions == "1d"
            x, moved = rows.cut(x, pieces, renumber)
            self._lower(call, moved, renumber)
            groups = tuple(Booked(len(g.units), g.n, r.slots, g.n) for g, r in pieces)
            ragged = handover.valid is not None
            event = Event("features", None, "end", -1, "cut", before, rows.length, groups, ragged)
            self.attachment.ledger.visit(call.run, event)
        self.projector.carry(rows, handover)
        return x

    @staticmethod
    def _picture(rows: Rows, unit: tuple[int, int, int]) -> Picture:
        return next(p for p in rows.pictures if (p.row, p.index) == unit[:2])

    # ------------------------------------------------------------------ visiting a method
    def _visit(
        self,
        call: Call,
        entry: Entry,
        x: Tensor,
        taps: Callable[[Group], DecoderTaps] | None,
        renumber_by_default: bool,
    ) -> tuple[Tensor, Moved | None]:
        """Shows the method its views, group by group, and cuts the rows as it says."""
        rows = call.rows
        assert rows is not None and call.run is not None
        names = {need.name for need in entry.needs}
        groups = rows.groups(entry.scope, bool(names & BY_TEXT), bool(names & BY_LENGTH))
        pieces, booked = [], []
        for group in groups:
            view = self._view(entry, x, rows, group, taps)
            reduction = self.attachment.decide(entry, view)
            slots = group.n if reduction is None else reduction.slots
            booked.append(Booked(len(group.units), group.n, slots, group.entered, group.text, group.length))
            if reduction is not None:
                pieces.append((group, reduction))
        before = rows.length
        moved, renumber = None, False
        if pieces:
            wanted = entry.site.positions
            renumber = renumber_by_default if wanted is None else wanted == "renumber"
            if renumber and self.spec.positions != "1d":
                raise PassError(
                    f"{type(entry.method).__name__}: positions='renumber' is not defined for rotary positions in three "
                    "dimensions; use positions='keep'"
                )
            x, moved = rows.cut(x, pieces, renumber)
            self._lower(call, moved, renumber)
            if rows.owner is not None:
                self.steps.append((entry.site, rows.owner))
        kind = "cut" if pieces else "observe"
        ragged = any(reduction.valid is not None for _, reduction in pieces)
        event = Event(
            entry.site.stage,
            entry.site.layer,
            entry.site.point,
            entry.index,
            kind,
            before,
            rows.length,
            tuple(booked),
            ragged,
        )
        self.attachment.ledger.visit(call.run, event)
        return x, moved

    def _view(
        self,
        entry: Entry,
        x: Tensor,
        rows: Rows,
        group: Group,
        taps: Callable[[Group], DecoderTaps] | None,
    ) -> TokenView:
        made: list[DecoderTaps] = []

        def tapped() -> DecoderTaps:
            if not made:
                assert taps is not None
                made.append(taps(group))
            return made[0]

        signals: dict[str, Signal] = {}
        for need in entry.needs:
            signals[need.key] = self._signal(need, x, rows, group, tapped)
        view = TokenView(
            rows.gather(x.detach(), group),
            entry.site,
            size=None if rows.size is None else rows.gather(rows.size, group),
            depth=self.depth if entry.site.stage == "decoder" else 1,
            grid=group.grid,
            part=None if rows.part is None else rows.gather(rows.part, group),
            entered=group.entered,
            columns=rows.relative(group, group.columns),
            signals=signals,
            state=RowState(rows, group, entry.index),
            row=RowNotes(rows, group, entry.index, entry.scope),
            memory=self.attachment.remember(entry.index),
        )
        for name, make in self.attachment.user.items():
            if name in signals:
                signals[name] = lambda make=make: make(view)
        return view

    def _signal(self, need: Need, x: Tensor, rows: Rows, group: Group, tapped: Callable[[], DecoderTaps]) -> Signal:
        if need.stage is not None:
            carried = rows.carried.get(f"{need.name}@{need.layer}")
            if carried is None:
                return None
            table, axis = carried
            if axis is None:
                return table[rows.of_pictures(group)]
            return lambda: rows.gather(table, group).movedim(1, axis)
        if need.name == "text":

            def text() -> Tensor | None:
                if not group.text:
                    return None
                return x.detach()[group.index[:, None], rows.text_columns(group)]

            return text
        if need.name in DECODER_SIGNALS:
            make = DECODER_SIGNALS[need.name]

            def signal() -> Tensor | None:
                with torch.no_grad():
                    return make(tapped())

            return signal
        return None

    @staticmethod
    def _lower(call: Call, moved: Moved, renumber: bool) -> None:
        if renumber:
            call.lowered = moved.dropped if call.lowered is None else call.lowered + moved.dropped

    # ------------------------------------------------------------------ layers
    def layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer pre-hook: cuts where a method stands, and gives later layers what fits their rows."""
        call = self.call
        if call is None or self.muted or replaying():
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        before = hidden
        if call.rows is not None and layer in self.points:
            hidden = self._cut_layer(call, layer, module, hidden, kwargs)
        segment = None if call.stream is None else call.stream.segment(layer)
        if segment is None or segment.first == 0:
            if self.flash and call.moved:
                return args, {**kwargs, "position_ids": None}  # gaps would read as packed sequences
            return None
        part = call.segments.get(segment.first)
        if part is None:
            part = self._enter_segment(call, segment, hidden, kwargs["position_embeddings"])
        kind = self.kinds[layer]
        if kind not in part.masks:
            part.masks[kind] = build_mask(self.lm().config, kind, hidden, part.valid, call.cache, layer)
        changed = {
            **kwargs,
            "position_embeddings": part.rotary,
            "attention_mask": part.masks[kind],
            "position_ids": None,
        }
        if hidden is before:
            return args, changed
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _enter_segment(self, call: Call, segment: Segment, hidden: Tensor, rotary: Any) -> SegmentCall:
        """A segment begins in this call: validity and rotary embeddings of its rows.

        Args:
            call: this call.
            segment: the segment, as the calls before left it.
            hidden: `[B, L, C]`, its first layer's input.
            rotary: position embeddings that fit these rows where no position was turned.
        """
        count, new = (hidden.shape[1], call.added[0][1]) if call.rows is None else (hidden.shape[1], call.rows.valid)
        call.added[segment.first] = (count, new)
        call.shifts[segment.first] = call.lowered
        if segment.turned:
            if call.rows is not None:
                positions = call.rows.positions
            else:
                assert call.positions is not None
                positions = call.positions if segment.shift is None else call.positions - segment.shift[:, None]
            rotary = self.lm().rotary_emb(hidden, position_ids=positions)
        valid = segment.extended(count, new, hidden.shape[0], hidden.device)
        call.segments[segment.first] = SegmentCall(rotary, valid)
        return call.segments[segment.first]

    def _cut_layer(self, call: Call, layer: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Methods at the end of the layer before and at the start of this one."""
        rows = call.rows
        assert rows is not None
        past = Segment(0) if call.stream is None else call.stream.segment(layer)
        fresh = past.first == layer  # an earlier call cut here: its past differs from that of the layer before
        rotary, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
        above = past
        if call.stream is not None:
            above = call.stream.segment(layer - 1)
            if above.first in call.segments:
                part = call.segments[above.first]
                rotary, mask = part.rotary, part.masks.get(self.kinds[layer])
        if fresh and past.shift is not above.shift and past.shift is not None:
            old = past.shift if above.shift is None else past.shift - above.shift
            rows.positions = rows.positions - old[:, None]
        taps = LayerTaps(self, call, layer, module, hidden, rotary, None if fresh else mask, past)
        lowered = call.lowered
        taken = False
        for entry in self.points[layer]:
            derive = taps.ahead if entry.site.point == "start" else taps.behind
            hidden, moved = self._visit(call, entry, hidden, derive, renumber_by_default=False)
            if moved is not None:
                taken = True
                taps.follow(hidden, moved)
        call.taps.pop(layer - 1, None)
        if not taken:
            return hidden
        if call.stream is None:
            call.stream = Stream(self.owner, hidden.shape[0], segments={0: Segment(0)})
            past = call.stream.segment(layer)
        if not fresh:
            past = call.stream.segments[layer] = past.copy(layer)
        past.turned = past.turned or call.lowered is not lowered
        for first, later in call.stream.segments.items():
            later.turned = later.turned or (first > layer and past.turned)
        self._enter_segment(call, past, hidden, taps.rotary)
        return hidden

    # ------------------------------------------------------------------ taps
    def tap_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention pre-hook: the rotary embeddings and the mask of the layer."""
        if self._listens():
            assert self.call is not None
            caught = self.call.taps.setdefault(layer, {})
            caught["rotary"], caught["mask"] = kwargs["position_embeddings"], kwargs.get("attention_mask")

    def tap_q(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches q before rope."""
        if self._listens():
            assert self.call is not None
            self.call.taps.setdefault(layer, {})["q"] = output

    def tap_k(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches k before rope."""
        if self._listens():
            assert self.call is not None
            self.call.taps.setdefault(layer, {})["k"] = output

    def tap_transition(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Catches how attention and MLP change their input, as two numbers a token."""
        if not self._listens():
            return
        assert self.call is not None
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        ratio, cosine = kernels.transition_stats(x.detach(), y.detach())
        self.call.taps.setdefault(layer, {}).setdefault("transition", []).append(torch.stack([ratio, cosine], 1))

    def _listens(self) -> bool:
        return self.call is not None and self.call.rows is not None and not self.muted and not replaying()

    # ------------------------------------------------------------------ after the text model
    def finish(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Text-model hook: files the past with the cache, gives rows back at their original length."""
        call, self.call = self.call, None
        if call is None or replaying():
            return None
        cache = call.cache
        if cache is None and not isinstance(output, tuple):
            cache = getattr(output, "past_key_values", None)
        stream = call.stream
        if stream is not None:
            for first, segment in stream.segments.items():
                count, new = call.added.get(first, call.added[0])
                segment.valid = segment.extended(count, new, stream.rows, kwargs["inputs_embeds"].device)
                segment.length += count
                lowered = call.shifts.get(first, call.lowered)
                if lowered is not None:
                    segment.shift = lowered if segment.shift is None else segment.shift + lowered
            stream.seen += call.columns
            stream.next = call.next
            if cache is not None:
                file_stream(cache, stream)
        rows = call.rows
        if rows is None or (rows.length == call.columns and not call.moved):
            return None
        hidden = output[0]
        restored = rows.restore(hidden, call.columns)
        if isinstance(output, tuple):
            return (restored, *output[1:])
        output.last_hidden_state = restored
        return output


class LayerTaps:
    """Taps of the layer that ran last and of the one to come, at one boundary between them."""

    def __init__(
        self,
        decoder: Decoder,
        call: Call,
        layer: int,
        module: nn.Module,
        hidden: Tensor,
        rotary: Any,
        mask: Any,
        past: Segment,
    ) -> None:
        self.decoder = decoder
        self.call = call
        self.layer = layer
        self.module = module
        self.hidden = hidden.detach()
        self.rotary = rotary
        self.mask = mask
        self.past = past
        self.back: list[Tensor] = []

    def follow(self, hidden: Tensor, moved: Moved) -> None:
        """A method cut the rows here; the next one at this boundary sees what is left."""
        self.hidden = hidden.detach()
        self.rotary = gather_rotary(self.rotary, moved.source)
        self.mask = None
        self.back.append(moved.source)

    def behind(self, group: Group) -> DecoderTaps:
        """Taps of the layer before, from what it did."""
        layer = self.layer - 1
        caught = self.call.taps.get(layer, {})
        transition = caught.get("transition")
        if "q" not in caught:
            return self._taps(group, layer, None, None, None, None, transition)
        rows_before = caught["q"].shape[1]
        attn = caught.get("attn") or self.decoder.lm().layers[layer].self_attn
        q, k = by_head(caught["q"], attn), by_head(caught["k"], attn)
        return self._taps(group, layer, attn, (q, k, rows_before), caught["rotary"], caught["mask"], transition)

    def ahead(self, group: Group) -> DecoderTaps:
        """Taps of the layer to come, from its own norm and projections."""
        attn = self.module.self_attn
        self.back_start = len(self.back)
        return self._taps(group, self.layer, attn, None, self.rotary, self.mask, None, ahead=True)

    def _taps(
        self,
        group: Group,
        layer: int,
        attn: nn.Module | None,
        caught: tuple[Tensor, Tensor, int] | None,
        rotary: Any,
        mask: Any,
        transition: list[Tensor] | None,
        ahead: bool = False,
    ) -> DecoderTaps:
        rows = self.call.rows
        assert rows is not None
        device = self.hidden.device
        now = rows.valid_columns(group)
        if now is None:
            now = torch.arange(rows.length, device=device).expand(len(group.units), rows.length)
        old = now  # columns as the layer had them
        if not ahead:
            for source in reversed(self.back):
                old = source[group.index].gather(1, old)
        visual = rows.relative(group, group.columns)
        text = rows.relative(group, rows.text_columns(group)) if group.text else visual[:, :0]
        moved = None
        if transition is not None:
            table = torch.stack(transition, 1)[group.index]
            moved = table.gather(3, old[:, None, None, :].expand(-1, 2, 2, -1))
        if attn is None:
            return DecoderTaps(_nothing, _nothing, 1.0, _nothing, old, visual, text, group.mixed, moved)
        cached = self._cached(layer, group, ahead)
        past = 0 if cached is None else cached.shape[2]
        length = self.hidden.shape[1] if caught is None else caught[2]

        def q(places: Tensor) -> Tensor:
            columns = old.gather(1, places)
            if caught is not None:
                part = caught[0][group.index].gather(2, _spread(columns, caught[0]))
            else:
                picked = self.hidden[group.index[:, None], columns]
                part = self._project(attn, picked, "q")
            return rotate(attn, part, gather_rotary(rotary, columns, group.index))

        def k() -> Tensor:
            if caught is not None:
                made = caught[1][group.index]
            else:
                made = self._project(attn, self.hidden, "k")[group.index]
            everything = torch.arange(length, device=device).expand(len(group.units), length)
            made = rotate(attn, made, gather_rotary(rotary, everything, group.index))
            return made if cached is None else torch.cat([cached.to(made.dtype), made], 2)

        def bias(places: Tensor) -> Tensor:
            columns = old.gather(1, places)
            if isinstance(mask, Tensor) and mask.dim() == 4:
                seen = mask[group.index] if mask.shape[0] > 1 else mask.expand(len(group.units), -1, -1, -1)
                seen = seen[:, :1, :, : past + length].gather(
                    2, columns[:, None, :, None].expand(-1, 1, -1, past + length)
                )
                return torch.where(seen, 0.0, float("-inf")) if seen.dtype == torch.bool else seen.float()
            key = torch.arange(-past, length, device=device)
            look = key[None, None, :] <= columns[:, :, None]
            real = self._real(group, past, length, ahead)
            if real is not None:
                look = look & real[:, None, :]
            return torch.where(look, 0.0, float("-inf"))[:, None]

        return DecoderTaps(q, k, float(attn.scaling), bias, old + past, visual, text, group.mixed, moved)

    def _cached(self, layer: int, group: Group, ahead: bool) -> Tensor | None:
        """Keys that the layer's cache held before this call, after rope."""
        count = self.past.length if ahead else self._above().length
        if not count or self.call.cache is None:
            return None
        keys: Tensor = self.call.cache.layers[layer].keys
        return keys[group.index][:, :, :count]

    def _above(self) -> Segment:
        stream = self.call.stream
        return Segment(0) if stream is None else stream.segment(self.layer - 1)

    def _real(self, group: Group, past: int, length: int, ahead: bool) -> Tensor | None:
        """Which keys are no padding, bool `[G, past + length]`, or None where all are real."""
        rows = self.call.rows
        assert rows is not None
        segment = self.past if ahead else self._above()
        new = rows.valid
        if not ahead and self.back:
            first = segment.first if segment.first in self.call.added else 0
            new = self.call.added[first][1]
        joined = segment.extended(length, new, rows.batch, self.hidden.device)
        return None if joined is None else joined[group.index]

    def _project(self, attn: nn.Module, x: Tensor, which: str) -> Tensor:
        """Queries or keys of a layer that has not run, before rope, with taps muted."""
        self.decoder.muted = True
        try:
            normed = self.module.input_layernorm(x)
            module = attn.q_proj if which == "q" else attn.k_proj
            made = module(normed)
            norm = getattr(attn, f"{which}_norm", None)
            if norm is not None:
                made = norm(made.unflatten(-1, (-1, attn.head_dim)))
            return by_head(made, attn)
        finally:
            self.decoder.muted = False


def _nothing(*_: Any) -> Tensor:
    raise PassError("this signal was not tapped")


def _spread(columns: Tensor, table: Tensor) -> Tensor:
    """Columns `[G, R]` as an index along dim 2 of `[G, H, L, d]`."""
    return columns[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])


# ---------------------------------------------------------------------- what differs between hosts
def projection(attn: nn.Module, which: str) -> nn.Module:
    """The last module whose output is q or k before rope: its norm, where there is one."""
    norm = getattr(attn, f"{which}_norm", None)
    found: nn.Module = norm if isinstance(norm, nn.Module) else getattr(attn, f"{which}_proj")
    return found


def by_head(x: Tensor, attn: nn.Module) -> Tensor:
    """`[B, L, H d]` or `[B, L, H, d]` to `[B, H, L, d]`."""
    if x.dim() == 3:
        x = x.unflatten(-1, (-1, attn.head_dim))
    return x.transpose(1, 2)


def rotate(attn: nn.Module, x: Tensor, rotary: Any) -> Tensor:
    """Applies the family's own rotary function to `[G, H, R, d]`."""
    apply = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModel(f"{type(attn).__name__} has no rotary function that attention rows can be derived with")
    cos, sin = rotary
    turned: Tensor = apply(x, x, cos, sin)[0]
    return turned


def gather_rotary(rotary: Any, columns: Tensor, rows: Tensor | None = None) -> Any:
    """Position embeddings of some columns: a pair, or one tensor, `[B or 1, L, D]`, gathered on dim -2.

    Args:
        rotary: what the host hands its layers.
        columns: int64 `[B, R]`.
        rows: int64 `[B]`, rows that the columns are of; None means all.
    """
    if isinstance(rotary, (tuple, list)):
        return tuple(gather_rotary(part, columns, rows) for part in rotary)
    part = rotary
    if part.shape[0] == 1:
        part = part.expand(columns.shape[0], *part.shape[1:])
    elif rows is not None:
        part = part[rows]
    return part.gather(1, columns.unsqueeze(-1).expand(-1, -1, part.shape[-1]))


def layer_kinds(config: Any, depth: int) -> list[str]:
    """The attention type of each layer, as masks are told apart."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * depth


def build_mask(config: Any, kind: str, hidden: Tensor, valid: Tensor | None, cache: Any, layer: int) -> Any:
    """The mask of one layer type for rows that a cut left, by the host's own function.

    Args:
        config: of the text model.
        kind: layer type.
        hidden: `[B, L, C]`.
        valid: bool `[B, past + L]`, or None.
        cache: the cache, or None.
        layer: whose cache length counts.
    """
    from transformers import masking_utils

    make = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
    return make(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=cache,
        position_ids=None,  # gaps would read as packed sequences
        layer_idx=layer,
    )


def find_pictures(seen: list[list[bool]], lengths: list[int] | None) -> list[Picture]:
    """Pictures from the runs of placeholders.

    Args:
        seen: `[B][S]`, placeholder columns.
        lengths: tokens of each picture in the order of the placeholders; splits runs of adjacent pictures.

    Returns:
        Pictures, row by row.

    Raises:
        CacheError: a run does not end where a picture does.
    """
    queue = list(lengths or [])
    pictures: list[Picture] = []
    for row, columns in enumerate(seen):
        index, at = 0, 0
        while at < len(columns):
            if not columns[at]:
                at += 1
                continue
            end = at
            while end < len(columns) and columns[end]:
                end += 1
            while at < end:
                take = queue.pop(0) if queue else end - at
                if take > end - at:
                    raise CacheError(
                        f"row {row} has a run of {end - at} placeholders where a picture needs {take}; chunked prefill "
                        "that splits a picture cannot be combined with a compression"
                    )
                pictures.append(Picture(row, index, list(range(at, at + take))))
                index += 1
                at += take
    return pictures
