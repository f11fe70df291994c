"""A language model's hooks: the cut at its boundary, cuts between its layers, and rows of the old length at its end.

Placeholders and their scatter happen as always; a pre-hook on the text model shortens embeddings, positions and mask.
Pre-hooks on the layers from the first cut on shorten hidden states once, and give every later layer its own rotary
embeddings and mask, since hosts hand all layers the same ones. `generate()` is untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...core.attachment import Attachment, Entry
from ...core.hooks import replaying, weak
from ...core.ledger import StageRun
from ...core.pictures import Picture
from ...core.signals import DECODER_SIGNALS
from ...core.site import StageLayout, layer_of
from ...core.stream import ATTRIBUTE, Segment, Stream, file_stream, read_stream, ticket
from ...core.threads import PerThread
from ...errors import CacheError, UnsupportedModel
from .. import host_objects, hosts
from ..base import child
from ..hosts import Arguments, Role
from .attention import attention_form
from .call import BLOCKS, Call, DecoderRun, deepstack, flat, top
from .checks import (
    check_call,
    check_checkpointing,
    check_hidden,
    check_layer,
    check_start,
    check_turn,
    packed,
    unknown_argument,
)
from .handover import Projector
from .intake import Intake
from .intake_checks import check_positions
from .masks import RECURRENT, layer_kinds
from .segments import Segments, begin_segment, end_call
from .sites import BY_LENGTH, BY_TEXT, Sites
from .spec import VLMSpec
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
        self.owner = ticket()
        self.running = PerThread(DecoderRun)
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
            "projected": StageLayout(1, width, 0, 0, provides=frozenset({"text"}), renumbers=spec.positions == "1d"),
            "decoder": StageLayout(
                depth,
                width,
                heads,
                depth - 1,
                frozenset({"start", "end"}),
                frozenset(DECODER_SIGNALS),
                blind=blind,
                last_cut=None if spec.last_cut is None else spec.last_cut(config),
                renumbers=spec.positions == "1d",
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
        first = 0 if self.flash else min(self.points, default=self.depth)
        self._read_signatures(lm, first)
        self.segments.check(first)
        self.projector.install(core)
        self.intake.install(core, model)
        put(lm, "pre", self.start)
        put(lm, "post", self.finish)
        put(lm.layers[self.probe], "pre", self.watch, self.probe)
        if self.spec.deepstack is not None:
            for layer in range(1, self.depth):
                put(lm.layers[layer], "pre", self.stack, layer)
            put(lm.layers[-1], "post", self.stack_last, self.depth)
        for layer in range(first, self.depth):
            put(lm.layers[layer], "pre", self.layer, layer)
        for cut, entries in self.points.items():
            needs = {need.name for e in entries if e.site.point == "end" for need in e.needs if need.stage is None}
            if not needs & set(DECODER_SIGNALS):
                continue
            block = lm.layers[cut - 1]
            form = attention_form(block)
            assert form is not None  # the layout offers no signals elsewhere
            if needs & (set(DECODER_SIGNALS) - {"transition"}):
                self.attentions[cut - 1] = Arguments(form.attn, [hosts.ROTARY, hosts.MASK])
                put(form.attn, "pre", self.tap_attention, cut - 1)
                put(form.projection("q"), "post", self.tap_q, cut - 1)
                put(form.projection("k"), "post", self.tap_k, cut - 1)
            if "transition" in needs:
                for branch in (form.attn, form.mlp):
                    self.branches[type(branch)] = Arguments(branch, [hosts.HIDDEN])
                    put(branch, "post", self.tap_transition, cut - 1)

    def _read_signatures(self, lm: Any, first: int) -> None:
        """Looks up what the text model, and its layers from `first` on, call their arguments."""
        of_tokens = [*self.spec.gather, *(self.spec.deepstack or ())]
        plain = [hosts.EMBEDDINGS, hosts.MASK, hosts.POSITIONS, hosts.CACHE]
        self.text = Arguments(lm, [*plain, *of_tokens], [hosts.IDS, hosts.LOGITS, hosts.CACHING])
        self.layers = {self.probe: Arguments(lm.layers[self.probe], [hosts.CACHE])}
        for layer in range(1, self.depth if self.spec.deepstack is not None else 1):
            self.layers[layer] = Arguments(lm.layers[layer], [hosts.HIDDEN], [hosts.CACHE])
        for layer in range(first, self.depth):
            required = [hosts.HIDDEN, hosts.MASK, hosts.ROTARY, hosts.CACHE, *self.spec.layer_args]
            self.layers[layer] = Arguments(lm.layers[layer], required, [hosts.POSITIONS])
        self.attentions: dict[int, Arguments] = {}
        self.branches: dict[type, Arguments] = {}

    # ------------------------------------------------------------------ the text model
    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Text-model pre-hook: the boundary cut, positions, the mask of the first segment."""

        def given(role: Role) -> Any:
            return self.text.get(role, args, kwargs)

        own_mask, own_positions = given(hosts.MASK), given(hosts.POSITIONS)
        incoming = self.intake.take(own_mask, own_positions)
        running = self.running.mine()
        running.call = None
        x, cache = given(hosts.EMBEDDINGS), host_objects.cache_in(module, self.text, args, kwargs)
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
        pictures: list[Picture] = []
        valid: Tensor | None = None
        if incoming.codes is not None and incoming.codes.shape == (batch, columns):
            check_call(incoming.mask, cache)
            pictures, valid = self.intake.pictures(incoming, columns)
        self.intake.check_features(self.core(), incoming, pictures, columns, held)
        pictures = [picture for picture in pictures if picture.n]  # one that the mask hides is padding
        if not pictures and stream is None:
            self._book(batch, columns, held, cache, None, [])
            return None
        mask = incoming.mask
        check_call(mask, cache)
        if self.spec.mask == "2d":
            check_call(own_mask, cache)
        positions = own_positions if stream is None or incoming.placed else None
        check_positions(hosts.POSITIONS, positions, columns)
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
        call = running.call = Call(cache, stream, None, columns, run, positions, width=columns)
        call.refusal = unknown_argument(
            self.text.called(args, kwargs), self.text.names, self.spec, self.core(), batch, columns, held
        )
        if self.points:
            check_checkpointing(module)
        if call.refusal is None and incoming.placed and own_positions is not None:
            caching = given(hosts.CACHING)
            caching = getattr(module.config, "use_cache", True) if caching is None else caching
            call.refusal = packed(own_positions, mask, cache, bool(caching))
        counted = flat(positions)
        call.next, call.follows = counted.amax(-1) + 1, counted[:, -1] + 1
        call.blocks = self.segments.blocks(incoming, columns, held, stream)
        changes: dict[Role, Any] = {}
        if pictures:
            below = None if stream is None else stream.segments[0].shift
            low = positions if below is None else positions - below[:, None]
            call.rows = self.intake.rows(x, pictures, valid, low, call.blocks, incoming.lengths, incoming.drafts)
            running.steps, running.last_rows = call.steps, None
            if self.projector.packing is not None:
                self.projector.packing.carry(call.rows, x.detach(), incoming.encoded)
            call.top = top(call.rows)
            changes = self.intake.own(call.rows, x, given)
            x = self.sites.boundary(call, x)
            running.last_rows = call.rows if self.attachment.trace else None
            call.width = x.shape[1]
            call.places = [(0, call.rows.snapshot())]
            call.added[0] = (x.shape[1], call.rows.valid, call.rows.states.get(BLOCKS))
        elif stream is not None:
            padded = mask is not None and (columns > 1 or stream.segments[0].valid is not None)
            real = mask[:, -columns:].bool() if padded and mask is not None else None
            call.added[0] = (columns, real, call.blocks)
        call.shifts[0] = call.lowered
        if not call.moved and (stream is None or not hasattr(cache, ATTRIBUTE)):
            # So far nothing differs from what the host does by itself; deepstack may be ours already.
            return self.text.put(args, kwargs, changes) if changes else None
        if call.stream is None:
            call.stream = Stream(self.owner, batch, segments={0: Segment(0)})
        changes.update(self.segments.enter(call, call.stream, x, own_mask))
        return self.text.put(args, kwargs, changes)

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
    def watch(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the first layer that keeps keys: the cache that is really used is the one that was seen."""
        running = self.running.mine()
        if running.muted or replaying() or torch.compiler.is_compiling():
            return
        cache = host_objects.cache_in(module, self.layers[layer], args, kwargs)
        if cache is None:
            return
        call = running.call
        if call is not None and call.cache is None:
            call.cache = cache  # the text model made it
        if getattr(cache, "is_compileable", False):
            return  # of one fixed length, refused where something is cut; asking how full it is waits for a GPU
        held = host_objects.length_of(module, cache, layer)
        if held != running.held or (call is not None and call.cache is not cache):
            raise hosts.changed(
                self.lm(),
                f"its layer {layer} works on a cache of {held} columns, and the one that was seen in the call of "
                f"the text model holds {running.held}",
            )

    def layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer pre-hook: cuts where a method stands, and gives later layers what fits their rows."""
        running = self.running.mine()
        call = running.call
        if call is None or running.muted or replaying():
            return None
        arguments = self.layers[layer]
        hidden = arguments.get(hosts.HIDDEN, args, kwargs)
        rotary = arguments.get(hosts.ROTARY, args, kwargs)
        if call.rows is not None and layer in self.points:
            check_hidden(module, call, hidden)
            check_layer(module, arguments.called(args, kwargs), arguments.names, self.spec, hidden)
            hidden = self._cut_layer(call, layer, module, hidden, rotary, arguments.get(hosts.MASK, args, kwargs))
        segment = None if call.stream is None else call.stream.segment(layer)
        if segment is None or segment.first == 0:
            if self.flash and call.moved:
                return arguments.put(args, kwargs, {hosts.POSITIONS: None})  # gaps would read as packed sequences
            return None
        if segment.first not in call.segments:
            begin_segment(call, segment, hidden)
        changes = {
            hosts.HIDDEN: hidden,
            hosts.ROTARY: self.segments.rotary(call, segment, layer, rotary, hidden),
            hosts.MASK: self.segments.mask(call, segment, layer, hidden),
            hosts.POSITIONS: None,
        }
        for role in self.spec.layer_args:
            value = arguments.get(role, args, kwargs)
            if call.since is not None and isinstance(value, Tensor) and value.shape[1] == call.width:
                index = call.since.unsqueeze(-1).expand(-1, -1, value.shape[-1])
                changes[role] = value.expand(hidden.shape[0], -1, -1).gather(1, index)
        return arguments.put(args, kwargs, changes)

    def stack(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer pre-hook: adds the tower's features of the layer before, as the host would between the two."""
        feature = self._stacked(layer - 1)
        if feature is None:
            return None
        arguments = self.layers[layer]
        return arguments.put(args, kwargs, {hosts.HIDDEN: arguments.get(hosts.HIDDEN, args, kwargs) + feature})

    def stack_last(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The same behind the last layer, which no other follows."""
        feature = self._stacked(layer - 1)
        if feature is None:
            return None
        return host_objects.with_hidden(output, host_objects.hidden_of(module, output) + feature)

    def _stacked(self, layer: int) -> Tensor | None:
        """The tower's features behind a layer, `[B, L, C]`, while a prefill with pictures runs."""
        running = self.running.mine()
        if running.call is None or running.call.rows is None or running.muted or replaying():
            return None
        return running.call.rows.states.get(deepstack(layer))

    def _cut_layer(self, call: Call, layer: int, module: nn.Module, hidden: Tensor, rotary: Any, mask: Any) -> Tensor:
        """Methods at the end of the layer before and at the start of this one."""
        rows = call.rows
        assert rows is not None
        past = Segment(0) if call.stream is None else call.stream.segment(layer)
        fresh = past.first == layer and layer > 0  # an earlier call cut here: the caches above and below differ
        above = past if call.stream is None else call.stream.segment(layer - 1)
        if fresh and past.shift is not above.shift and past.shift is not None:
            old = past.shift if above.shift is None else past.shift - above.shift
            rows.positions = rows.positions - old[:, None]
        if above.first in call.segments:
            rotary = self.segments.rotary(call, above, layer, rotary, hidden)
            mask = None if fresh else self.segments.mask(call, above, layer, hidden)
        taps = LayerTaps(
            self.lm, self.segments, self.running, call, layer, module, hidden, rotary, None if fresh else mask, past
        )
        lowered, taken = call.lowered, False
        for entry in self.points[layer]:
            derive = taps.ahead if entry.site.point == "start" else taps.behind
            hidden, moved = self.sites.visit(call, entry, hidden, derive, renumber_by_default=False)
            if moved is not None:
                taken = True
                taps.follow(hidden, moved, call.lowered is not lowered)
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
        call.places.append((layer, rows.snapshot()))
        return hidden

    # ------------------------------------------------------------------ taps
    def tap_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention pre-hook: the rotary embeddings and the mask of the layer."""
        caught = self._catch(layer)
        if caught is not None:
            arguments = self.attentions[layer]
            caught["rotary"] = arguments.get(hosts.ROTARY, args, kwargs)
            caught["mask"] = arguments.get(hosts.MASK, args, kwargs)

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
        x = self.branches[type(module)].get(hosts.HIDDEN, args, kwargs)
        y = host_objects.hidden_of(module, output)
        ratio, cosine = kernels.transition_stats(x.detach(), y.detach())
        caught.setdefault("transition", []).append(torch.stack([ratio, cosine], 1))

    def _catch(self, layer: int) -> dict[str, Any] | None:
        """Where taps of this layer go, while a prefill with pictures runs."""
        running = self.running.mine()
        if running.call is None or running.call.rows is None or running.muted or replaying():
            return None
        return running.call.taps.setdefault(layer, {})

    # ------------------------------------------------------------------ after the text model
    def finish(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Text-model hook: files the past with the cache, gives rows back at their original length."""
        running = self.running.mine()
        call, running.call = running.call, None
        if call is None or replaying():
            return None
        stream, rows = call.stream, call.rows
        hidden = host_objects.hidden_of(module, output)
        if stream is not None:
            end_call(call, stream, hidden.device)
            if call.cache is not None:
                file_stream(call.cache, stream)
        if rows is None or (rows.length == call.columns and not call.moved):
            return None
        if hidden.shape[1] != rows.length:
            wanted = self.text.get(hosts.LOGITS, args, kwargs)
            if not isinstance(wanted, int) or hidden.shape[1] != wanted:
                raise hosts.changed(
                    module, f"it gave {hidden.shape[1]} columns back where {rows.length} went through its last layer"
                )
            return None  # the host looked at the last tokens only
        self._restore_recorded(call, output)
        return host_objects.with_hidden(output, rows.restore(hidden, call.columns))

    def _restore_recorded(self, call: Call, output: Any) -> None:
        """Hidden states that the host recorded get the columns of the prompt, each from those of its layer."""
        recorded = host_objects.recorded_states(output)
        if recorded is None:
            return
        made = []
        for index, states in enumerate(recorded):  # the input of layer 0, then what each layer gave
            shot = [shot for first, shot in call.places if first <= max(index - 1, 0)][-1]
            if index == len(recorded) - 1:  # the last one stands behind the final norm
                shot = call.places[-1][1]
            if states is not None and states.shape[1] == shot.length:
                states = shot.restore(states, call.columns)
            made.append(states)
        host_objects.set_recorded_states(output, tuple(made))


__all__ = ["BY_LENGTH", "BY_TEXT", "Call", "Decoder"]
