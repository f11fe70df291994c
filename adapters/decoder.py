"""Cuts at a language model's boundary and between its layers, driven by `VLMSpec`.

Placeholders and their scatter happen as always; a pre-hook on the text model shortens embeddings, positions and mask.
Pre-hooks on the layers from the first cut on shorten hidden states once, and give every later layer its own rotary
embeddings and mask, since hosts hand all layers the same ones. `generate()` is untouched.
"""

from __future__ import annotations

import inspect
from collections import deque
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
from ..method import Site, StageLayout, layer_of
from ..rows import PAD, TEXT, Group, Moved, Picture, RowNotes, Rows, RowState
from ..signals import DECODER_SIGNALS, DecoderTaps, Need
from ..stream import ATTRIBUTE, Segment, Stream, file_stream, read_stream, ticket
from ..view import Signal, TokenView
from . import shapes
from .base import VLMSpec, child
from .decoder_taps import LayerTaps, gather_rotary, last_of, projection
from .handover import Handover, Projector
from .masks import RECURRENT, block_ids, build_mask, layer_kinds
from .spans import IMAGE, NONE, PARTS, VIDEO, Look, crop_length, find_pictures, usable

BY_TEXT = frozenset({"text", "text_attention", "attention_to_text"})
BY_LENGTH = frozenset({"text_attention", "attention_to_text", "last_attention", "attention_logits", "transition"})
HOST = -1
"""Key, among the states of `Rows`, of what hosts keep for each token."""
KNOWN = frozenset({"inputs_embeds", "attention_mask", "position_ids", "input_ids"})


@dataclass
class Incoming:
    """What the inner model was called with; the text model sees only part of it.

    Attributes:
        codes: int8 `[B, S]`, what each column is (see `spans`), or None where the call brings no features.
        mask: `[B, past + S]`, or what else came as a mask.
        types: int `[B, past + S or S]`, type ids, or None.
        lengths: by code, what the encoder's outputs told, or None.
        encoded: by code, how many pictures the encoder saw; beams show them again.
        placed: whether the caller gave position ids; hosts that make their own take the cache's length for the past.
    """

    codes: Tensor | None
    mask: Any
    types: Tensor | None
    lengths: dict[int, list[int]] | None
    placed: bool = False
    encoded: dict[int, int] = field(default_factory=dict)


@dataclass
class SegmentCall:
    """One segment during one call.

    Attributes:
        rotary: position embeddings by the host's own, for rows whose positions were turned; else None.
        masks: attention masks, by layer type.
        valid: bool `[B, past + L]`, or None.
        blocks: int64 `[B, past + L]`, or None.
    """

    rotary: dict[str, Any] | None
    valid: Tensor | None
    blocks: Tensor | None
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
        positions: int64 `[..., B, S]` as the host counts, of a call without pictures.
        blocks: int64 `[B, S]`, bidirectional blocks of a call without pictures, or None.
        added: what this call adds to the caches of each segment: (columns, validity, blocks) by first layer.
        segments: by first layer.
        taps: per layer, what hooks caught.
        moved: whether the boundary changed the rows.
        width: columns that the text model got.
        since: int64 `[B, L]`, which of these columns each column of the rows is, once a layer was cut.
        gathered: host position embeddings that follow `since`, with what each was made from.
        next: int64 `[B]`, one more than the largest position of this call, as the host counts, and
        follows: one more than the last one; behind a clip that is less.
        top: int64 `[B]`, one more than the last position of each row as it entered, in the count of the first segment.
        lowered: int64 `[B]`, how far renumbering cuts of this call lowered positions so far, or None.
        shifts: the same by segment, as it held there.
    """

    cache: Any
    stream: Stream | None
    rows: Rows | None
    columns: int
    run: StageRun | None
    positions: Tensor | None = None
    blocks: Tensor | None = None
    added: dict[int, tuple[int, Tensor | None, Tensor | None]] = field(default_factory=dict)
    segments: dict[int, SegmentCall] = field(default_factory=dict)
    taps: dict[int, dict[str, Any]] = field(default_factory=dict)
    moved: bool = False
    width: int = 0
    since: Tensor | None = None
    gathered: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    next: Tensor | None = None
    follows: Tensor | None = None
    top: Tensor | None = None
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
        self.core, self.lm = weak(core), weak(lm)
        self.signature = inspect.signature(type(core).forward)
        self.depth = len(lm.layers)
        self.ids = [getattr(core.config, name, None) for name in spec.ids]
        self.told = dict(zip((IMAGE, VIDEO), spec.told))
        self.shapes: deque[Tensor] = deque(maxlen=2)  # of pictures and of clips, as the tower was told
        self.kinds = layer_kinds(lm.config, self.depth)
        # Hosts read the length of the cache from the first layer that keeps keys.
        self.probe = next((i for i, kind in enumerate(self.kinds) if kind not in RECURRENT), 0)
        self.rule = spec.block
        if self.rule is not None and self.rule.when is not None:
            name, value = self.rule.when
            self.rule = self.rule if getattr(lm.config, name, None) == value else None
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
            self.points.setdefault(layer_of(entry.site.layer, entry.site.point), []).append(entry)
        self.projected = attachment.at("projected")
        self._install(core, lm)

    # ------------------------------------------------------------------ layout and hooks
    @staticmethod
    def layout(lm: Any, spec: VLMSpec) -> dict[str, StageLayout]:
        """What a text model offers to methods."""
        config = lm.config
        depth, width, heads = len(lm.layers), int(config.hidden_size), int(config.num_attention_heads)
        kinds = layer_kinds(config, depth)
        blind = frozenset(i for i, kind in enumerate(kinds) if kind in RECURRENT or not spec.attention)
        return {
            "projected": StageLayout(1, width, 0, 0, provides=frozenset({"text"})),
            "decoder": StageLayout(
                depth,
                width,
                heads,
                depth - 1,
                frozenset({"start", "end"}),
                frozenset(DECODER_SIGNALS),
                blind=blind,
                last_cut=None if spec.last_cut is None else spec.last_cut(config),
            ),
        }

    def _install(self, core: nn.Module, lm: Any) -> None:
        put = self.attachment.hook
        implementation = str(getattr(lm.config, "_attn_implementation", ""))
        if self.points and implementation not in ("sdpa", "eager", "flash_attention_2", "flash_attention_3"):
            raise UnsupportedModel(
                f"cuts inside the language model are known with sdpa, eager and flash attention, not {implementation!r}"
            )
        self.flash = "flash" in implementation
        self.projector.install(core)
        put(core, "pre", self.enter)
        if self.spec.shapes is not None:
            tower = child(core, self.spec.tower)
            self.tower_signature = inspect.signature(type(tower).forward)
            put(tower, "pre", self.measure)
        put(lm, "pre", self.start)
        put(lm, "post", self.finish)
        first = 0 if self.flash else min(self.points, default=self.depth)
        for layer in range(first, self.depth):
            put(lm.layers[layer], "pre", self.layer, layer)
        if self.spec.deepstack is not None:
            for layer in range(self.depth):
                put(lm.layers[layer], "post", self.stack, layer)
        for cut, entries in self.points.items():
            needs = {need.name for e in entries if e.site.point == "end" for need in e.needs if need.stage is None}
            if not needs & set(DECODER_SIGNALS):
                continue
            block = lm.layers[cut - 1]
            if needs & (set(DECODER_SIGNALS) - {"transition"}):
                put(block.self_attn, "pre", self.tap_attention, cut - 1)
                put(projection(block.self_attn, "q"), "post", self.tap_q, cut - 1)
                put(projection(block.self_attn, "k"), "post", self.tap_k, cut - 1)
            if "transition" in needs:
                put(block.self_attn, "post", self.tap_transition, cut - 1)
                put(block.mlp, "post", self.tap_transition, cut - 1)

    # ------------------------------------------------------------------ the inner model
    def enter(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Core pre-hook: where the pictures are; placeholders count only where features come along."""
        given = self.signature.bind(module, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        encoded = given.get("mm_encoder_outputs") or {}
        features = {
            code: getattr(encoded[name], "pooler_output", None)  # absent where the projector runs later
            for code, name in ((IMAGE, "image"), (VIDEO, "video"))
            if encoded.get(name) is not None
        }
        pixels = any(given.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        types = given.get(self.spec.types) if self.spec.types else None
        codes = None
        if features or pixels:
            codes = self._codes(module, given.get("input_ids"), given.get("inputs_embeds"), types)
        lengths: dict[int, list[int]] | None
        if pixels:
            self.shapes.clear()  # the tower is about to be called
            packing = self.projector.packing
            if packing is None:
                lengths = shapes.lengths(self.told, given, module.config)
            else:
                packing.calls.clear()
                lengths = packing.lengths(given)
        else:
            lengths = {code: [len(part) for part in parts] for code, parts in features.items() if parts is not None}
        placed = given.get("position_ids") is not None
        seen = {code: len(set(map(id, parts))) for code, parts in features.items() if isinstance(parts, (list, tuple))}
        self.incoming = Incoming(codes, given.get("attention_mask"), types, lengths or None, placed, seen)

    def measure(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tower pre-hook: rows and columns of the pictures that it encodes."""
        name = self.spec.shapes
        assert name is not None
        value = self.tower_signature.bind(module, *args, **kwargs).arguments.get(name)
        if value is not None and not replaying():
            self.shapes.append(shapes.read(name, value, self.core().config))

    def _codes(self, module: Any, ids: Tensor | None, embeds: Tensor | None, types: Tensor | None) -> Tensor | None:
        """What each column is, int8 `[B, S]`."""
        if ids is None:
            if embeds is None:
                return None
            table = module.get_input_embeddings()
            ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
            for number in self.ids:
                if number is not None:
                    wanted = table(torch.tensor(number, device=embeds.device)).to(embeds.dtype)
                    ids = torch.where((embeds == wanted).all(-1), number, ids)
        codes = torch.full(ids.shape, NONE, dtype=torch.int8, device=ids.device)
        for code, number in zip((IMAGE, VIDEO), self.ids):
            if number is not None:
                codes = torch.where(ids == number, code, codes)
        if types is not None and self.spec.positions == "mrope":  # some clips carry the id of pictures
            clip = (types[:, -ids.shape[1] :] == 2) & (codes > 0)
            codes = torch.where(clip, VIDEO, codes)
        return codes.to(torch.int8)

    # ------------------------------------------------------------------ the text model
    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Text-model pre-hook: the boundary cut, positions, the mask of the first segment."""
        incoming, self.incoming = self.incoming, None
        self.call = None
        x, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if x is None:
            return None
        if incoming is None:
            incoming = Incoming(None, kwargs.get("attention_mask"), None, None, kwargs.get("position_ids") is not None)
        batch, columns = x.shape[:2]
        held = 0 if cache is None else int(cache.get_seq_length())
        stream = read_stream(cache, self.owner, batch, held, self.probe)
        pictures: list[Picture] = []
        valid: Tensor | None = None
        if incoming.codes is not None and incoming.codes.shape == (batch, columns):
            self._refuse(incoming.mask, cache)
            pictures, valid = self._pictures(incoming, columns)
        if not pictures and stream is None:
            self._book(batch, columns, held, cache, None, [])
            return None
        mask = incoming.mask
        self._refuse(mask, cache)
        if self.spec.mask == "2d":
            self._refuse(kwargs.get("attention_mask"), cache)
        self._refuse_unknown(kwargs, batch, columns)
        positions = kwargs.get("position_ids") if stream is None or incoming.placed else None
        if positions is not None and positions.shape[-2] != batch:
            positions = positions.expand(*positions.shape[:-2], batch, -1)
        if stream is not None:
            self._check_turn(stream, columns, mask, positions)
        if positions is None:
            begin = torch.full((batch,), held, device=x.device) if stream is None else stream.next
            assert begin is not None
            positions = begin[:, None] + torch.arange(columns, device=x.device)
        run = self._book(batch, columns, held, cache, stream, pictures)
        if stream is None and held:
            stream = Stream(self.owner, batch, seen=held, segments={0: Segment(0, held)})
            if mask is not None:
                stream.segments[0].valid = mask[:, :held].bool()
        call = self.call = Call(cache, stream, None, columns, run, positions, width=columns)
        flat = _flat(positions)
        call.next, call.follows = flat.amax(-1) + 1, flat[:, -1] + 1
        call.blocks = self._blocks(incoming, columns, held, stream)
        kwargs = dict(kwargs)
        if pictures:
            below = None if stream is None else stream.segments[0].shift
            low = positions if below is None else positions - below[:, None]
            call.rows = self._rows(x, pictures, valid, low, call.blocks, incoming.lengths)
            if self.projector.packing is not None:
                self.projector.packing.carry(call.rows, x.detach(), incoming.encoded)
            call.top = _top(call.rows)
            self._own(call.rows, kwargs)
            x = self._boundary(call, x)
            call.width = x.shape[1]
            call.added[0] = (x.shape[1], call.rows.valid, call.rows.states.get((HOST, "blocks")))
        elif stream is not None:
            padded = mask is not None and (columns > 1 or stream.segments[0].valid is not None)
            real = mask[:, -columns:].bool() if padded and mask is not None else None
            call.added[0] = (columns, real, call.blocks)
        call.shifts[0] = call.lowered
        if not call.moved and (stream is None or not hasattr(cache, ATTRIBUTE)):
            # So far nothing differs from what the host does by itself; deepstack may be ours already.
            return (args, kwargs) if self.spec.deepstack is not None and call.rows is not None else None
        return args, self._first_segment(call, x, kwargs)

    def _first_segment(self, call: Call, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Embeddings, positions and the mask that the text model gets."""
        if call.stream is None:
            call.stream = Stream(self.owner, x.shape[0], segments={0: Segment(0)})
        segment, rows = call.stream.segments[0], call.rows
        if rows is not None:
            positions = rows.positions
            for name in self.spec.gather:
                if (HOST, name) in rows.states:
                    kwargs[name] = rows.states[HOST, name]
        else:
            assert call.positions is not None
            positions = call.positions if segment.shift is None else call.positions - segment.shift[:, None]
        count, new, blocks = call.added[0]
        valid = segment.extended(count, new, x.shape[0], x.device)
        mask: Any
        if self.spec.mask != "2d":
            mask = self._outer_masks(
                call, x, valid, segment.extended_blocks(count, blocks, x.shape[0], x.device), kwargs
            )
        elif valid is not None:
            mask = valid.to(torch.int64)
        elif call.cache is not None:
            mask = None
        else:
            # Without a cache, position gaps and no mask read as packed sequences: say that all columns are one.
            mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        return {**kwargs, "inputs_embeds": x, "position_ids": positions, "attention_mask": mask}

    def _outer_masks(
        self, call: Call, x: Tensor, valid: Tensor | None, blocks: Tensor | None, kwargs: dict[str, Any]
    ) -> Any:
        """Masks of hosts that build them outside the text model, in the container they came in."""
        config = self.lm().config

        def build(kind: str) -> Any:
            layer = self.kinds.index(kind)
            return build_mask(config, kind, x, valid, call.cache, layer, blocks, self.rule, explicit=call.cache is None)

        if isinstance(kwargs.get("attention_mask"), dict) or len(set(self.kinds)) > 1:
            return {kind: build(kind) for kind in dict.fromkeys(self.kinds)}
        return build(self.kinds[0])

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
            raise CacheError(f"a cut needs the 2-D attention mask, and the model was called with a {what} one")

    def _refuse_unknown(self, kwargs: dict[str, Any], batch: int, columns: int) -> None:
        """A tensor with one entry for each token that nobody told us about would go out of step."""
        known = {*KNOWN, *self.spec.gather, *(self.spec.deepstack or ()), self.spec.types}
        for name, value in kwargs.items():
            if name not in known and isinstance(value, Tensor) and value.shape[:2] == (batch, columns):
                raise UnsupportedModel(
                    f"the language model gets {name!r} {list(value.shape)}, one entry for each token, which this "
                    f"compression does not know how to cut (family {self.core().config.model_type!r})"
                )

    def _check_turn(self, stream: Stream, columns: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """A call on a filled cache must bring new tokens only.

        Hosts slice full ids by the length of the cache, which a cut made shorter: tokens would be fed twice.
        """
        advice = (
            "pass only the new ids, and an attention_mask of the full length (all turns, pictures uncut); full ids are "
            "sliced by the length of the cut cache, which feeds tokens twice"
        )
        if mask is not None and mask.shape[1] not in (stream.seen + columns, columns):
            raise CacheError(
                f"the cache has seen {stream.seen} columns and this call brings {columns}, but the attention mask has "
                f"{mask.shape[1]}: {advice}"
            )
        if columns > 1 and positions is not None and stream.next is not None:
            text = positions if positions.dim() == 2 else positions[-1]
            first = text[:, 0]
            if mask is not None:
                first = text.gather(1, mask[:, -columns:].to(torch.int64).argmax(1, keepdim=True))[:, 0]
            if not bool(((first == stream.next) | (first == stream.follows)).all()):
                raise CacheError(
                    f"the next position is {stream.next.tolist()}, but this call starts at {first.tolist()}: {advice}"
                )

    def _book(
        self, batch: int, columns: int, held: int, cache: Any, stream: Stream | None, pictures: list[Picture]
    ) -> StageRun | None:
        """Opens the books of a prefill, or counts a decode step."""
        ledger = self.attachment.ledger
        if columns == 1 and held and not pictures:
            ledger.step(batch, held)
            return None
        lengths = () if stream is None else tuple((first, s.length) for first, s in sorted(stream.segments.items()))
        return ledger.begin(
            StageRun(
                "decoder",
                batch,
                columns,
                held,
                len(pictures),
                cache is not None,
                visual=sum(len(picture.columns) for picture in pictures),
                seen=held if stream is None else stream.seen,
                held=lengths,
            )
        )

    # ------------------------------------------------------------------ rows
    def _pictures(self, incoming: Incoming, columns: int) -> tuple[list[Picture], Tensor | None]:
        """Finds the pictures of a call; the one read-back of a prefill."""
        codes, mask = incoming.codes, incoming.mask
        assert codes is not None
        valid = None if mask is None else mask[:, -columns:].bool()
        both = codes if valid is None else torch.stack([codes, valid.to(torch.int8)])
        host = both.cpu().tolist()
        seen, real = (host, None) if valid is None else host
        if real is not None and all(map(all, real)):
            valid = real = None
        total = sum(code in (IMAGE, VIDEO) for row in seen for code in row)
        lengths = self.projector.lengths(usable(incoming.lengths, self.spec), total)
        pictures = find_pictures(seen, lengths)
        for picture in pictures:
            row = seen[picture.row]
            text = [c == NONE and (real is None or bool(real[picture.row][i])) for i, c in enumerate(row)]
            picture.text_after = sum(text[picture.columns[0] :])
            picture.text_after_last = sum(text[picture.columns[-1] :])
            picture.n = len(picture.columns)
        self.projector.number(pictures)
        return pictures, valid

    def _blocks(self, incoming: Incoming, columns: int, held: int, stream: Stream | None) -> Tensor | None:
        """Bidirectional blocks of this call's columns."""
        if self.rule is None or incoming.types is None or (self.rule.first_only and held):
            return None
        first = held if stream is None else stream.seen
        return block_ids(incoming.types[:, -columns:], self.rule, first)

    def _rows(
        self,
        x: Tensor,
        pictures: list[Picture],
        valid: Tensor | None,
        positions: Tensor,
        blocks: Tensor | None,
        lengths: dict[int, list[int]] | None,
    ) -> Rows:
        batch, columns = x.shape[:2]
        label = torch.full((batch, columns), TEXT)
        for picture in pictures:
            label[picture.row, picture.columns] = picture.index
        label = label.to(x.device)
        counts = [columns] * batch
        if valid is not None:
            label = torch.where(valid, label, PAD)
            counts = valid.sum(1).tolist()
        look = Look(pictures, x.detach(), positions, self.core(), self.spec, crop_length(lengths, self.spec))
        part = PARTS[self.spec.parts](look)
        if self.spec.shapes is not None:
            shapes.measure(pictures, [call.tolist() for call in self.shapes])
        place = torch.arange(columns, device=x.device).expand(batch, columns)
        rows = Rows(batch, columns, counts, pictures, label, part, valid, place, positions)
        if blocks is not None:
            rows.states[HOST, "blocks"] = blocks
        self.steps = []
        if self.attachment.trace:
            rows.owner, rows.first_part = place.clone(), part
        return rows

    def _own(self, rows: Rows, kwargs: dict[str, Any]) -> None:
        """Takes over what hosts keep for each token, so that it follows the cuts."""
        for name in self.spec.gather:
            if kwargs.get(name) is not None:
                rows.states[HOST, name] = kwargs[name]
        if self.spec.deepstack is None:
            return
        where, what = self.spec.deepstack
        visual, features = kwargs.get(where), kwargs.get(what)
        if visual is None or features is None:
            return
        x = kwargs["inputs_embeds"]
        for layer, feature in enumerate(features):
            room = x.new_zeros(x.shape)
            rows.states[HOST, f"deepstack {layer}"] = room.masked_scatter(
                visual.unsqueeze(-1).to(x.device), feature.to(x.device, x.dtype)
            )
        kwargs[where] = kwargs[what] = None

    def stack(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Layer hook: adds the tower's features of this depth, as the host would."""
        call = self.call
        if call is None or call.rows is None or self.muted or replaying():
            return None
        feature = call.rows.states.get((HOST, f"deepstack {layer}"))
        if feature is None:
            return None
        if isinstance(output, tuple):
            return (output[0] + feature, *output[1:])
        return output + feature

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
            index = torch.tensor([rows.pictures[i].tower for i in rows.of_pictures(group).tolist()], device=x.device)
            reduction = handover.reduction(index, group.n)
            if reduction is not None:
                pieces.append((group, reduction))
        if pieces:
            before, held = rows.length, sum(rows.lengths)
            renumber = self.spec.positions == "1d"
            x, _ = rows.cut(x, pieces, renumber)
            if renumber:
                self._lower(call, 0)
            groups = tuple(Booked(len(g.units), g.n, r.slots, g.n) for g, r in pieces)
            ragged = handover.valid is not None
            gone = held - sum(rows.lengths) if ragged else None
            event = Event("features", None, "end", -1, "cut", before, rows.length, groups, ragged, gone)
            self.attachment.ledger.visit(call.run, event)
        self.projector.carry(rows, handover)
        return x

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
            booked.append(
                Booked(len(group.units), group.n, slots, group.entered, group.text, group.length, group.mixed)
            )
            if reduction is not None:
                pieces.append((group, reduction))
        before, held = rows.length, sum(rows.lengths)
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
            if renumber:
                self._lower(call, 0 if entry.site.layer is None else layer_of(entry.site.layer, entry.site.point))
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
            held - sum(rows.lengths) if ragged else None,
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
        self.attachment.bind_user(view, signals)
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
    def _lower(call: Call, layer: int) -> None:
        """After a renumbering cut before `layer`: how far positions lie below the host's, gaps of earlier cuts too."""
        rows, stream = call.rows, call.stream
        assert rows is not None and call.top is not None
        top = call.top
        if stream is not None and layer:
            first, here = stream.segments[0].shift, stream.segment(layer).shift
            top = top + (0 if first is None else first) - (0 if here is None else here)
        call.lowered = top - _top(rows)

    # ------------------------------------------------------------------ layers
    def layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer pre-hook: cuts where a method stands, and gives later layers what fits their rows."""
        call = self.call
        if call is None or self.muted or replaying():
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if call.rows is not None and layer in self.points:
            hidden = self._cut_layer(call, layer, module, hidden, kwargs)
        segment = None if call.stream is None else call.stream.segment(layer)
        if segment is None or segment.first == 0:
            if self.flash and call.moved:
                return args, {**kwargs, "position_ids": None}  # gaps would read as packed sequences
            return None
        if segment.first not in call.segments:
            self._enter_segment(call, segment, hidden)
        kind = self.kinds[layer]
        changed = {
            **kwargs,
            "position_embeddings": self._rotary(call, segment, kind, kwargs.get("position_embeddings"), hidden),
            "attention_mask": self._mask(call, segment, kind, layer, hidden),
            "position_ids": None,
        }
        if not args:
            return args, {**changed, "hidden_states": hidden}
        rest = list(args[1:])
        for at in self.spec.layer_args:
            value = args[at] if at < len(args) else None
            if call.since is not None and isinstance(value, Tensor) and value.shape[1] == call.width:
                index = call.since.unsqueeze(-1).expand(-1, -1, value.shape[-1])
                rest[at - 1] = value.expand(hidden.shape[0], -1, -1).gather(1, index)
        return (hidden, *rest), changed

    def _mask(self, call: Call, segment: Segment, kind: str, layer: int, hidden: Tensor) -> Any:
        """The mask of a layer behind a cut; made once a segment and layer type."""
        part = call.segments[segment.first]
        count = call.added[segment.first][0]
        if kind not in part.masks:
            rows = hidden
            if hidden.shape[1] != count:  # the host already looks at the last tokens only
                rows = hidden.new_zeros(hidden.shape[0], count, 1).expand(-1, -1, hidden.shape[2])
            part.masks[kind] = build_mask(
                self.lm().config,
                kind,
                rows,
                part.valid,
                call.cache,
                layer,
                part.blocks,
                self.rule,
                explicit=hidden.shape[1] != count,
            )
        mask = part.masks[kind]
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] != hidden.shape[1]:
            return mask[:, :, -hidden.shape[1] :]
        return mask

    def _rotary(self, call: Call, segment: Segment, kind: str, given: Any, hidden: Tensor) -> Any:
        """Position embeddings of a layer behind a cut: the host's own, at the columns that are left."""
        part = call.segments[segment.first]
        if part.rotary is not None:
            if kind not in part.rotary:
                part.rotary[kind] = self._turn(call, segment, kind, hidden)
            return last_of(part.rotary[kind], hidden.shape[1])
        if call.since is None or given is None:
            return given
        first = given[0] if isinstance(given, (tuple, list)) else given
        if first.shape[1] != call.width:  # sliced by the host to its last queries
            return given
        key = id(given)
        if key not in call.gathered:
            call.gathered[key] = (given, gather_rotary(given, call.since))
        return call.gathered[key][1]

    def _turn(self, call: Call, segment: Segment, kind: str, hidden: Tensor) -> Any:
        """Position embeddings at positions that a cut renumbered."""
        if call.rows is not None:
            positions = call.rows.positions
        else:
            assert call.positions is not None
            positions = call.positions if segment.shift is None else call.positions - segment.shift[:, None]
        rotary = self.lm().rotary_emb
        typed = "layer_type" in inspect.signature(type(rotary).forward).parameters
        return rotary(hidden, positions, kind) if typed else rotary(hidden, positions)

    def _enter_segment(self, call: Call, segment: Segment, hidden: Tensor) -> None:
        """A segment begins in this call: validity and positions of its rows."""
        count, rows = hidden.shape[1], call.rows
        if rows is None:
            new, blocks = call.added[0][1:]
        else:
            new, blocks = rows.valid, rows.states.get((HOST, "blocks"))
        call.added[segment.first] = (count, new, blocks)
        call.shifts[segment.first] = call.lowered
        batch, device = hidden.shape[0], hidden.device
        call.segments[segment.first] = SegmentCall(
            {} if segment.turned else None,
            segment.extended(count, new, batch, device),
            segment.extended_blocks(count, blocks, batch, device),
        )

    def _cut_layer(self, call: Call, layer: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Methods at the end of the layer before and at the start of this one."""
        rows = call.rows
        assert rows is not None
        past = Segment(0) if call.stream is None else call.stream.segment(layer)
        fresh = past.first == layer and layer > 0  # an earlier call cut here: the caches above and below differ
        above = past if call.stream is None else call.stream.segment(layer - 1)
        if fresh and past.shift is not above.shift and past.shift is not None:
            old = past.shift if above.shift is None else past.shift - above.shift
            rows.positions = rows.positions - old[:, None]
        rotary, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        if above.first in call.segments:
            rotary = self._rotary(call, above, self.kinds[layer], rotary, hidden)
            mask = None if fresh else self._mask(call, above, self.kinds[layer], layer, hidden)
        taps = LayerTaps(self, call, layer, module, hidden, rotary, None if fresh else mask, past)
        lowered, taken = call.lowered, False
        for entry in self.points[layer]:
            derive = taps.ahead if entry.site.point == "start" else taps.behind
            hidden, moved = self._visit(call, entry, hidden, derive, renumber_by_default=False)
            if moved is not None:
                taken = True
                taps.follow(hidden, moved)
                call.since = moved.source if call.since is None else call.since.gather(1, moved.source)
                call.gathered.clear()
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
        self._enter_segment(call, past, hidden)
        return hidden

    # ------------------------------------------------------------------ taps
    def tap_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention pre-hook: the rotary embeddings and the mask of the layer."""
        caught = self._catch(layer)
        if caught is not None:
            caught["rotary"], caught["mask"] = kwargs.get("position_embeddings"), kwargs.get("attention_mask")

    def tap_q(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches q before rope."""
        caught = self._catch(layer)
        if caught is not None:
            caught["q"] = output

    def tap_k(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches k before rope."""
        caught = self._catch(layer)
        if caught is not None:
            caught["k"] = output

    def tap_transition(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Catches how attention and MLP change their input, as two numbers a token."""
        caught = self._catch(layer)
        if caught is None:
            return
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        ratio, cosine = kernels.transition_stats(x.detach(), y.detach())
        caught.setdefault("transition", []).append(torch.stack([ratio, cosine], 1))

    def _catch(self, layer: int) -> dict[str, Any] | None:
        """Where taps of this layer go, while a prefill with pictures runs."""
        if self.call is None or self.call.rows is None or self.muted or replaying():
            return None
        return self.call.taps.setdefault(layer, {})

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
            self._file(call, stream, kwargs["inputs_embeds"].device)
            if cache is not None:
                file_stream(cache, stream)
        rows, hidden = call.rows, output[0]
        if rows is None or (rows.length == call.columns and not call.moved) or hidden.shape[1] != rows.length:
            return None
        restored = rows.restore(hidden, call.columns)
        if isinstance(output, tuple):
            return (restored, *output[1:])
        output.last_hidden_state = restored
        return output

    @staticmethod
    def _file(call: Call, stream: Stream, device: torch.device) -> None:
        """What this call added is past now."""
        for first, segment in stream.segments.items():
            count, new, blocks = call.added.get(first, call.added[0])
            valid = segment.extended(count, new, stream.rows, device)
            segment.blocks = segment.extended_blocks(count, blocks, stream.rows, device)
            segment.valid = valid
            segment.length += count
            lowered = call.shifts.get(first, call.lowered)
            if lowered is not None:
                segment.shift = lowered if segment.shift is None else segment.shift + lowered
        stream.seen += call.columns
        stream.tail += call.columns
        if call.rows is not None:
            # The last picture of a row wins.
            last = {picture.row: picture.text_after_last for picture in call.rows.pictures}
            stream.tail = min(last.values())
        stream.next, stream.follows = call.next, call.follows


def _flat(positions: Tensor) -> Tensor:
    """Positions `[B, L]`; of several axes, the largest."""
    return positions if positions.dim() == 2 else positions[-3:].amax(0)


def _top(rows: Rows) -> Tensor:
    """One more than the last position of each row, int64 `[B]`."""
    positions = _flat(rows.positions)
    return (positions if rows.valid is None else positions.masked_fill(~rows.valid, -1)).amax(-1) + 1
