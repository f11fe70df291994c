"""A language model's hooks: the cut at its boundary, cuts between its layers, and rows of the old length at its end.

Placeholders and their scatter happen as always; a pre-hook on the text model shortens embeddings, positions and mask.
Pre-hooks on the layers from the first cut on shorten hidden states once, and give every later layer its own rotary
embeddings and mask, since hosts hand all layers the same ones. `generate()` is untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...core.attachment import Attachment, Entry
from ...core.hooks import replaying, weak
from ...core.row_data import Group
from ...core.rows import PromptRows
from ...core.signals import AHEAD, DecoderTaps
from ...core.site import layer_of
from ...core.stream import ATTRIBUTE, Segment, Stream, attachment_number, file_stream, read_stream
from ...core.threads import PerThread
from ...errors import CacheError, UnsupportedModel
from .. import host_objects, hosts
from ..base import child
from ..hosts import Role
from .call import BLOCKS, Call, DecoderRun, Opened, flat, top
from .catching import Catcher
from .checks import check_call, check_checkpointing, check_start
from .closing import restore_recorded
from .evicting import Evictor
from .holding import shares_held
from .intake import Intake
from .layers import Layers
from .masked import told_once
from .masks import RECURRENT, layer_kinds, sources
from .opening import book, positions_of, refusal_of, uncut_past
from .prefill_rows import prefill_rows, take_over
from .projector import Projector
from .segments import Segments, end_call
from .signatures import Signatures
from .sites import BY_LENGTH, BY_TEXT, Sites
from .skipping import Skipper
from .spec import VLMSpec
from .stacking import Stacker
from .taps import LayerTaps


class Decoder:
    """Drives one language model.

    Attributes:
        projector: hooks in front of it, and
        intake: those on the inner model; they tell of the pictures.
        sites: lets methods act on the rows.
        segments: makes masks and position embeddings of what is left.
        running: what each thread runs.
        tower_grid: rows and columns of patches of the tower's input, where they are known.
    """

    def __init__(
        self,
        attachment: Attachment,
        spec: VLMSpec,
        model: nn.Module,
        core: nn.Module,
        tower: Any = None,
        tower_grid: tuple[int, int] | None = None,
    ) -> None:
        self.attachment = attachment
        self.spec = spec
        lm = child(core, spec.lm)
        self.core, self.lm = weak(core), weak(lm)
        self.depth = len(lm.layers)
        kinds = layer_kinds(lm.config, self.depth)
        # Hosts read the length of the cache from the first layer that keeps keys.
        self.probe = next((i for i, kind in enumerate(kinds) if kind not in RECURRENT), 0)
        self.owner = attachment_number()
        self.running = PerThread(DecoderRun)
        self.tower_grid = tower_grid
        self.projector = Projector(attachment, spec, tower)
        self.intake = Intake(attachment, spec, core, self.projector)
        self.sites = Sites(attachment, spec, self.projector, self.depth)
        self.segments = Segments(spec, self.lm, kinds)
        self.evictor = Evictor(attachment, self.lm, self.segments, self.running)
        self.sources = sources(lm.config, kinds)
        self.points: dict[int, list[Entry]] = {}
        for entry in attachment.at("decoder"):
            self.points.setdefault(layer_of(entry.site.layer, entry.site.point), []).append(entry)
        self._install(core, lm, model)

    def _install(self, core: nn.Module, lm: Any, model: nn.Module) -> None:
        put = self.attachment.hook
        implementation = str(getattr(lm.config, "_attn_implementation", ""))
        if (self.points or self.evictor.acts) and implementation not in (
            "sdpa",
            "eager",
            "flash_attention_2",
            "flash_attention_3",
        ):
            raise UnsupportedModel(
                "cuts inside the language model and of its cache are known "
                f"with sdpa, eager and flash attention, not {implementation!r}"
            )
        flash = "flash" in implementation
        first = 0 if flash or self.evictor.weighs else min(self.points, default=self.depth)
        if self.evictor.acts:  # layer 0 goes by what the text model gets
            first = min(first, 1)
        if flash and self.evictor.weighs:
            raise UnsupportedModel(
                f"{self.evictor.weighs} adds log(size) to attention, which {implementation!r} cannot; use sdpa or eager"
            )
        told = told_once(self.segments.kinds, first)
        self.signatures = Signatures(self.spec, lm, self.probe, first, told)
        looks_ahead = any(need.name in AHEAD for entry in self.attachment.at("projected") for need in entry.needs)
        self.segments.check(0 if looks_ahead else first)
        self.projector.install(core)
        self.intake.install(core, model)
        put(lm, "pre", self.start)
        put(lm, "post", self.finish)
        layers = Layers(
            self.spec,
            self.lm,
            self.owner,
            self.points,
            self.sites,
            self.segments,
            self.running,
            self.signatures.layers,
            flash,
            self.sources,
            self.evictor.follows,
            told,
        )
        put(lm.layers[self.probe], "pre", layers.check_cache, self.probe)
        for layer in told:
            put(lm.layers[layer], "pre", layers.tell, layer)
        if self.spec.deepstack is not None:
            Stacker(self.attachment, self.running, self.signatures.layers).install(lm)
        for layer in range(first, self.depth):
            put(lm.layers[layer], "pre", layers.layer, layer)
        catcher = Catcher(self.attachment, self.running)
        for layer, block in enumerate(lm.layers):
            catcher.install(layer, block, self._caught(layer))
        self.evictor.watch.install(lm.layers)
        Skipper(self.attachment, self.running, catcher.compared).install(lm)

    def _caught(self, layer: int) -> set[str]:
        """Signals that methods read of what a layer did."""
        behind = [entry for entry in self.points.get(layer + 1, ()) if entry.site.point == "end"]
        needs = {need.name for entry in behind for need in entry.needs if need.stage is None}
        return needs | ({"last_attention"} if self.evictor.watch.reads(layer) else set())

    # ------------------------------------------------------------------ the text model
    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Text-model pre-hook: the boundary cut, positions, the mask of the first segment."""
        opened = self._open(module, args, kwargs)
        if opened is None:
            return None
        text, call, x = self.signatures.text, opened.call, opened.x
        changes: dict[Role, Any] = {}
        if opened.pictures:
            rows = call.rows = self._rows(opened)
            changes = take_over(self.spec, rows, x, lambda role: text.get(role, args, kwargs))
            x = self.sites.boundary(call, x, self._ahead)
            self.running.mine().last_rows = rows if self.attachment.trace else None
            call.width = x.shape[1]
            call.places = [(0, rows.snapshot())]
            call.added[0] = (x.shape[1], rows.valid, rows.states.get(BLOCKS))
        elif call.stream is not None:
            mask, columns = opened.incoming.mask, call.columns
            padded = mask is not None and (columns > 1 or call.stream.segments[0].valid is not None)
            real = mask[:, -columns:].bool() if padded and mask is not None else None
            call.added[0] = (columns, real, call.blocks)
        call.drop_by_segment[0] = call.position_drop
        if not call.moved and (call.stream is None or not hasattr(call.cache, ATTRIBUTE)):
            # So far nothing differs from what the host does by itself; deepstack may be ours already.
            return text.put(args, kwargs, changes) if changes else None
        if call.stream is None:
            call.stream = Stream(self.owner, x.shape[0], segments={0: Segment(0)})
        changes.update(self.segments.enter(call, call.stream, x, text.get(hosts.MASK, args, kwargs)))
        return text.put(args, kwargs, changes)

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opened | None:
        """Checks a call and opens its books; None where nothing is to be done in it."""
        text = self.signatures.text
        own_mask, own_positions = text.get(hosts.MASK, args, kwargs), text.get(hosts.POSITIONS, args, kwargs)
        incoming = self.intake.take(own_mask, own_positions)
        running = self.running.mine()
        running.call = None
        x, cache = text.get(hosts.EMBEDDINGS, args, kwargs), host_objects.cache_in(module, text, args, kwargs)
        running.held = held = host_objects.length_of(module, cache)
        if x is None:
            if hasattr(cache, ATTRIBUTE):
                raise CacheError(
                    "the text model was called with token ids on a cache that a compression cut; call the whole model, "
                    "which makes embeddings of them"
                )
            return None
        batch, columns = x.shape[:2]
        check_start(module, columns, held, incoming.mask, own_mask, own_positions, cache)
        stream = read_stream(cache, self.owner, batch, held, self.probe)
        pictures, valid = self.intake.find(incoming, batch, columns, held, cache)
        if not pictures and stream is None:
            book(self.attachment.ledger, batch, columns, held, cache, None, [], self.probe)
            return None
        check_call(incoming.mask, cache)
        if self.spec.mask == "2d":
            check_call(own_mask, cache)
        positions = positions_of(incoming, own_positions, stream, batch, columns, held, x)
        run = book(self.attachment.ledger, batch, columns, held, cache, stream, pictures, self.probe)
        if stream is None and held:
            stream = uncut_past(self.owner, batch, held, incoming.mask)
        call = running.call = Call(cache, stream, None, columns, run, positions, width=columns)
        if pictures:
            self.evictor.check(cache)
        self.evictor.follow(call, incoming.drafts, bool(pictures))
        call.refusal = refusal_of(self.spec, self.core(), module, text, args, kwargs, incoming, held, cache)
        if self.points or self.attachment.skips:
            check_checkpointing(module)
        counted = flat(positions)
        call.next, call.follows = counted.amax(-1) + 1, counted[:, -1] + 1
        call.blocks = self.segments.blocks(incoming, columns, held, stream)
        return Opened(call, incoming, x, pictures, valid)

    def _rows(self, opened: Opened) -> PromptRows:
        """The rows of a prefill with pictures, with what the tower kept for each token."""
        call, running = opened.call, self.running.mine()
        assert call.positions is not None
        below = None if call.stream is None else call.stream.segments[0].shift
        rows = prefill_rows(
            self.spec,
            self.core(),
            opened,
            call.positions if below is None else call.positions - below[:, None],
            self.intake.tower_sizes(),
            self.attachment.trace,
        )
        running.steps, running.last_rows, running.cached = call.steps, None, None
        self.projector.carry(rows, opened.x.detach(), opened.incoming.encoded)
        call.top = top(rows)
        return rows

    def _ahead(self, call: Call, x: Tensor) -> Callable[[Group], DecoderTaps]:
        """What layer 0 would make of rows, for signals that are read in front of it.

        Args:
            call: a prefill with pictures.
            x: `[B, L, C]`, its rows as they are.
        """
        past, lm = Segment(0) if call.stream is None else call.stream.segment(0), self.lm()
        grown = x * float(getattr(lm, "embedding_multiplier", 1.0))  # Granite's text model does so before its layers
        taps = LayerTaps(self.lm, self.segments, self.running, call, 0, lm.layers[0], grown, None, None, past)
        taps.renumbered = True  # the host has made no position embeddings yet
        return taps.ahead

    # ------------------------------------------------------------------ after the text model
    def finish(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Text-model hook: files the past with the cache, gives rows back at their original length."""
        running = self.running.mine()
        call, running.call = running.call, None
        if call is None or replaying():
            return None
        stream, rows = call.stream, call.rows
        hidden = host_objects.hidden_of(module, output)
        leaving = self.evictor.decide(call)
        if leaving and stream is None:
            stream = call.stream = Stream(self.owner, hidden.shape[0], segments={0: Segment(0)})
        if stream is not None:
            end_call(call, stream, hidden.device)
            if leaving:
                self.evictor.apply(call, stream, leaving)
            if call.cache is not None:
                file_stream(call.cache, stream)
        if rows is not None and self.attachment.trace:
            kinds = self.segments.kinds
            running.cached = shares_held(call, self.lm(), kinds, self.sources) if self.evictor.acts else None
        if rows is None or (rows.length == call.columns and not call.moved):
            return None
        if hidden.shape[1] != rows.length:
            wanted = self.signatures.text.get(hosts.LOGITS, args, kwargs)
            if not isinstance(wanted, int) or hidden.shape[1] != wanted:
                raise hosts.changed(
                    module, f"it gave {hidden.shape[1]} columns back where {rows.length} went through its last layer"
                )
            return None  # the host looked at the last tokens only
        restore_recorded(call, output)
        return host_objects.with_hidden(output, rows.restore(hidden, call.columns))


__all__ = ["BY_LENGTH", "BY_TEXT", "Call", "Decoder"]
