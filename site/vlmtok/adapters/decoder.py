"""A language model's hooks: the cut at its boundary, cuts between its layers, and rows of the old length at its end.

Placeholders and their scatter happen as always; a pre-hook on the text model shortens embeddings, positions and mask.
Pre-hooks on the layers from the first cut on shorten hidden states once, and give every later layer its own rotary
embeddings and mask, since hosts hand all layers the same ones. `generate()` is untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..attachment import Attachment, Entry, replaying, weak
from ..errors import UnsupportedModel
from ..ledger import StageRun
from ..method import Site, StageLayout, layer_of
from ..rows import Picture, Rows
from ..signals import DECODER_SIGNALS
from ..stream import ATTRIBUTE, Segment, Stream, file_stream, read_stream, ticket
from .base import VLMSpec, child
from .decoder_attention import attention_form
from .decoder_call import BLOCKS, Call, deepstack, flat, top
from .decoder_checks import KNOWN, check_arguments, check_call, check_turn
from .decoder_intake import Intake
from .decoder_segments import Segments, begin_segment, end_call
from .decoder_sites import BY_LENGTH, BY_TEXT, Sites
from .decoder_taps import LayerTaps
from .handover import Projector
from .masks import RECURRENT, layer_kinds


class Decoder:
    """Drives one language model.

    Attributes:
        projector: hooks in front of it, and
        intake: those on the inner model; they tell of the pictures.
        sites: lets methods act on the rows.
        segments: makes masks and position embeddings of what is left.
        call: the forward that runs, or None.
        muted: while a layer's modules are called for signals, out of turn.
        last_rows: of the last prefill with pictures; kept only for traces, and
        steps: the sites that cut them and the owners of the original columns behind each.
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
        self.owner = ticket()
        self.call: Call | None = None
        self.muted = False
        self.last_rows: Rows | None = None
        self.steps: list[tuple[Site, Tensor]] = []
        self.tower_grid = tower_grid
        self.projector = Projector(attachment, spec, tower)
        self.intake = Intake(attachment, spec, core, self.projector)
        self.sites = Sites(attachment, spec, self.projector, self.depth)
        self.segments = Segments(spec, self.lm, kinds)
        self.points: dict[int, list[Entry]] = {}
        for entry in attachment.at("decoder"):
            self.points.setdefault(layer_of(entry.site.layer, entry.site.point), []).append(entry)
        self._install(core, lm, model)

    # ------------------------------------------------------------------ layout and hooks
    @staticmethod
    def layout(lm: Any, spec: VLMSpec) -> dict[str, StageLayout]:
        """What a text model offers to methods."""
        config = lm.config
        depth, width, heads = len(lm.layers), int(config.hidden_size), int(config.num_attention_heads)
        kinds = layer_kinds(config, depth)
        blind = frozenset(
            i
            for i, kind in enumerate(kinds)
            if kind in RECURRENT or not spec.attention or attention_form(lm.layers[i]) is None
        )
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

    def _install(self, core: nn.Module, lm: Any, model: nn.Module) -> None:
        put = self.attachment.hook
        implementation = str(getattr(lm.config, "_attn_implementation", ""))
        if self.points and implementation not in ("sdpa", "eager", "flash_attention_2", "flash_attention_3"):
            raise UnsupportedModel(
                f"cuts inside the language model are known with sdpa, eager and flash attention, not {implementation!r}"
            )
        self.flash = "flash" in implementation
        self.projector.install(core)
        self.intake.install(core, model)
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
            form = attention_form(block)
            assert form is not None  # the layout offers no signals elsewhere
            if needs & (set(DECODER_SIGNALS) - {"transition"}):
                put(form.attn, "pre", self.tap_attention, cut - 1)
                put(form.projection("q"), "post", self.tap_q, cut - 1)
                put(form.projection("k"), "post", self.tap_k, cut - 1)
            if "transition" in needs:
                put(form.attn, "post", self.tap_transition, cut - 1)
                put(form.mlp, "post", self.tap_transition, cut - 1)

    # ------------------------------------------------------------------ the text model
    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Text-model pre-hook: the boundary cut, positions, the mask of the first segment."""
        incoming = self.intake.take(kwargs)
        self.call = None
        x, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if x is None:
            return None
        batch, columns = x.shape[:2]
        held = 0 if cache is None else int(cache.get_seq_length())
        stream = read_stream(cache, self.owner, batch, held, self.probe)
        pictures: list[Picture] = []
        valid: Tensor | None = None
        if incoming.codes is not None and incoming.codes.shape == (batch, columns):
            check_call(incoming.mask, cache)
            pictures, valid = self.intake.pictures(incoming, columns)
        if not pictures and stream is None:
            self._book(batch, columns, held, cache, None, [])
            return None
        mask = incoming.mask
        check_call(mask, cache)
        if self.spec.mask == "2d":
            check_call(kwargs.get("attention_mask"), cache)
        check_arguments(kwargs, self.spec, self.core(), batch, columns)
        positions = kwargs.get("position_ids") if stream is None or incoming.placed else None
        if positions is not None and positions.shape[-2] != batch:
            positions = positions.expand(*positions.shape[:-2], batch, -1)
        if stream is not None:
            check_turn(stream, columns, mask, positions)
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
        counted = flat(positions)
        call.next, call.follows = counted.amax(-1) + 1, counted[:, -1] + 1
        call.blocks = self.segments.blocks(incoming, columns, held, stream)
        kwargs = dict(kwargs)
        if pictures:
            below = None if stream is None else stream.segments[0].shift
            low = positions if below is None else positions - below[:, None]
            call.rows = self.intake.rows(x, pictures, valid, low, call.blocks, incoming.lengths, incoming.drafts)
            self.steps, self.last_rows = call.steps, None
            if self.projector.packing is not None:
                self.projector.packing.carry(call.rows, x.detach(), incoming.encoded)
            call.top = top(call.rows)
            self.intake.own(call.rows, kwargs)
            x = self.sites.boundary(call, x)
            self.last_rows = call.rows if self.attachment.trace else None
            call.width = x.shape[1]
            call.added[0] = (x.shape[1], call.rows.valid, call.rows.states.get(BLOCKS))
        elif stream is not None:
            padded = mask is not None and (columns > 1 or stream.segments[0].valid is not None)
            real = mask[:, -columns:].bool() if padded and mask is not None else None
            call.added[0] = (columns, real, call.blocks)
        call.shifts[0] = call.lowered
        if not call.moved and (stream is None or not hasattr(cache, ATTRIBUTE)):
            # So far nothing differs from what the host does by itself; deepstack may be ours already.
            return (args, kwargs) if self.spec.deepstack is not None and call.rows is not None else None
        if call.stream is None:
            call.stream = Stream(self.owner, batch, segments={0: Segment(0)})
        return args, self.segments.enter(call, call.stream, x, kwargs)

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
            begin_segment(call, segment, hidden)
        given = kwargs.get("position_embeddings")
        changed = {
            **kwargs,
            "position_embeddings": self.segments.rotary(call, segment, layer, given, hidden),
            "attention_mask": self.segments.mask(call, segment, layer, hidden),
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

    def stack(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Layer hook: adds the tower's features of this depth, as the host would."""
        call = self.call
        if call is None or call.rows is None or self.muted or replaying():
            return None
        feature = call.rows.states.get(deepstack(layer))
        if feature is None:
            return None
        if isinstance(output, tuple):
            return (output[0] + feature, *output[1:])
        return output + feature

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
            rotary = self.segments.rotary(call, above, layer, rotary, hidden)
            mask = None if fresh else self.segments.mask(call, above, layer, hidden)
        taps = LayerTaps(self, call, layer, module, hidden, rotary, None if fresh else mask, past)
        lowered, taken = call.lowered, False
        for entry in self.points[layer]:
            derive = taps.ahead if entry.site.point == "start" else taps.behind
            hidden, moved = self.sites.visit(call, entry, hidden, derive, renumber_by_default=False)
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
        begin_segment(call, past, hidden)
        return hidden

    # ------------------------------------------------------------------ taps
    def tap_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention pre-hook: the rotary embeddings and the mask of the layer."""
        caught = self._catch(layer)
        if caught is not None:
            caught["rotary"], caught["mask"] = kwargs.get("position_embeddings"), kwargs.get("attention_mask")

    def tap_q(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches what q is made from."""
        caught = self._catch(layer)
        if caught is not None:
            caught["q"] = output

    def tap_k(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches what k is made from."""
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
            end_call(call, stream, kwargs["inputs_embeds"].device)
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


__all__ = ["BY_LENGTH", "BY_TEXT", "KNOWN", "Call", "Decoder"]
