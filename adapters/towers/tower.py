"""The three-hook surgery that shortens rows between attention and MLP of any pre-norm block, driven by `BlockSpec`.

A block computes ``x1 = x + attn(norm(x))`` and ``x1 + mlp(norm2(x1))``; x1 is a local variable that no hook can shorten
for the second residual. So: (1) a pre-hook on what reads x1 gives the MLP branch the shorter row M x1; (2) a hook on
the last module of that branch keeps its output z; (3) a hook on the block returns M x1 + z. With gradients the block
must stay whole (stochastic depth, checkpointing), so (2) puts z back on its slots' places, U z, and (3) returns
S(x1 + U z) + (M - S) x1, where S gathers at `keep`: S U is the identity since a kept token owns its slot, so this is
M x1 + z for any weights. Without gradients, under torch.compile, (2) hands the block a zero to add. Without gradients
in eager mode (1) does it all: the tensor object that it is given is that local variable, nobody else's, so M x1 is set
into it and the block goes on with the shorter row as if it had always had it: no other hook works, nothing is added
twice.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment, Entry
from ...core.hooks import replaying
from ...core.ledger import Event, Group, StageRun
from ...core.sequence import Row, Sequence
from ...core.signals import TOWER_SIGNALS, Need, TowerTaps, tower_signal, tower_signals
from ...core.site import StageLayout
from ...core.threads import PerThread, Watch
from ...core.view import Signal, TokenView
from ...errors import PassError, UnsupportedModel
from .. import forms, host_objects, hosts
from ..base import TowerSpec, child
from ..hosts import Arguments
from .vit_pass import LayerRecord, Pass, Running, autocast_dtype, probe, same_forward
from .vit_taps import BlockTaps


class Tower:
    """Drives one tower: hooks call it with the layer, it asks the methods and shortens the row."""

    masks = False  # whether attention masks must follow the rows, so that every layer behind a cut needs its hook

    def __init__(self, attachment: Attachment, spec: TowerSpec) -> None:
        self.attachment = attachment
        self.stage = spec.stage
        self.block = spec.block
        self.num_prefix = spec.num_prefix
        self.depth = len(spec.blocks)
        self.last = spec.last % self.depth
        self.configured = spec.grid
        self.stem = spec.stem is not None
        self.running = PerThread(lambda: Running(Watch(spec.stage)))
        self.reader = BlockTaps(spec.block)
        self.entries = attachment.at(self.stage)
        self.tapped = attachment.tapped(self.stage)
        self.spread = spec.spread
        self.masked = spec.masked
        self.maps = tuple(inspect.unwrap(method).__code__ for method in spec.maps)
        self.follow = bool(spec.block.rope)
        proportional = [e.site.layer or 0 for e in self.entries if e.method.proportional]
        self.proportional_from = min(proportional, default=self.depth)
        self.last_trained: Pass | None = None
        self.width = spec.width
        self.inputs: dict[int, Arguments] = {}
        self.attentions: dict[int, Arguments] = {}
        self.middles: dict[int, Arguments] = {}
        self.refuse_bias(spec)
        self._install(spec)

    # ------------------------------------------------------------------ layout and hooks
    @staticmethod
    def layout(spec: TowerSpec) -> StageLayout:
        """What a tower offers to methods."""
        why = forms.strange(spec)
        return StageLayout(
            depth=len(spec.blocks),
            width=spec.width,
            heads=spec.heads,
            last=spec.last % len(spec.blocks),
            points=frozenset({"start", "mid", "end"}),
            provides=tower_signals(spec.num_prefix if spec.classed else 0, attention=not why),
            num_prefix=spec.num_prefix,
            carries=spec.carries,
            why=why,
        )

    def _install(self, spec: TowerSpec) -> None:
        """Hooks on the blocks that have something to do; block 0 starts the pass."""
        if not self.entries and not self.tapped and not self.attachment.at("features"):
            return
        put = self.attachment.hook
        if spec.stem is not None:
            put(spec.stem, "post", self.embed)
        first_cut = min((e.site.layer or 0 for e in self.entries), default=self.depth)
        for layer, module in enumerate(spec.blocks):
            here = {point: self.attachment.at(self.stage, layer, point) for point in ("start", "mid", "end")}
            own = any(here.values()) or layer in self.tapped
            biased = layer > self.proportional_from or (layer == self.proportional_from and bool(here["start"]))
            biased = (biased and self.block.bias is not None) or (self.masks and layer >= first_cut)
            moved = self.follow and layer > first_cut
            masked = spec.masked and layer >= first_cut
            if not (layer == 0 or own or biased or moved or masked or (self.spread and layer == self.last)):
                continue
            attn = child(module, self.block.attn)
            wanted_of_block = [hosts.HIDDEN, *([self.block.rope] if self.block.rope else [])]
            self.inputs[layer] = Arguments(module, wanted_of_block, [hosts.BIAS, hosts.CAUSAL])
            put(module, "pre", self.start, layer)
            if biased or own or masked:
                wanted_of_attention = [role for role in (hosts.HIDDEN, self.block.bias, self.block.rope) if role]
                self.attentions[layer] = Arguments(attn, wanted_of_attention, [hosts.BIAS])
                put(attn, "pre", self.attend, layer)
            wanted = self._projections(here, layer)
            if "q" in wanted and self.block.q is not None:
                put(child(attn, self.block.q), "post", self.tap_q, layer)
            if "k" in wanted and self.block.k is not None:
                put(child(attn, self.block.k), "post", self.tap_k, layer)
            if here["mid"]:
                reader = child(module, self.block.mid)
                self.middles[layer] = Arguments(reader, [hosts.HIDDEN])
                put(reader, "pre", self.mid, layer)
                put(child(module, self.block.branch_end), "post", self.branch, layer)
            if own or (self.spread and layer == self.last):
                put(module, "post", self.end, layer)

    def _projections(self, here: dict[str, list[Entry]], layer: int) -> set[str]:
        """Which of q and k the signals of this layer need."""
        needs = [n for point in ("mid", "end") for e in here[point] for n in e.needs if n.stage is None]
        needs += self.tapped.get(layer, [])
        return {which for n in needs if n.name in TOWER_SIGNALS for which in TOWER_SIGNALS[n.name].projections}

    def refuse_bias(self, spec: TowerSpec) -> None:
        """Refuses proportional attention where the attention takes no bias on the keys.

        Raises:
            UnsupportedModel: the block has no such argument, or its attention is of a form that is not known.
        """
        asking = [type(entry.method).__name__ for entry in self.entries if entry.method.proportional]
        why = "it takes no bias on the keys" if self.block.bias is None else forms.strange(spec)
        if asking and why:
            raise UnsupportedModel(
                f"{asking[0]} wants proportional attention, but with the attention of this tower that is not possible: "
                f"{why}; switch it off in the method (prop_attn=False)"
            )

    # ------------------------------------------------------------------ hooks, in the order in which they run
    def embed(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook on the patch embedding: notes rows and columns of the pictures that come in."""
        if not replaying():
            shape = output.shape if isinstance(output, Tensor) and output.dim() == 4 else ()
            self.running.mine().map = (shape[-2], shape[-1]) if shape else None

    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Block pre-hook: begins the pass, inserts, reduces at ``start``, hands over the rotary table."""
        if self.reader.muted:
            return None
        again = replaying()
        arguments = self.inputs[layer]
        x = arguments.get(hosts.HIDDEN, args, kwargs)
        rope = None if self.block.rope is None else arguments.get(self.block.rope, args, kwargs)
        if again:
            record = self._replay(layer, x)
        else:
            if layer == 0:
                self._check_input(module, x)
                self._check_masks(module, args, kwargs)
                self._begin(x)
                self._pass.autocast = autocast_dtype(x.device.type)
            record = self._enter(layer)
            if self._pass.grad:
                record.probe = probe(x)
        before = x
        if not torch.compiler.is_compiling():
            record.taps["block"] = id(x)
        if again:
            for step in record.start:
                x = torch.cat([x, step], 1) if isinstance(step, Tensor) else step(x)
        else:
            record.start, record.inserted = [], 0
            for entry in self.attachment.at(self.stage, layer, "start"):
                taps = self._ahead(layer, module, x, rope)
                if entry.inserts:
                    x = self._insert(entry, record, x, taps)
                    taps = self._ahead(layer, module, x, rope)
                x = self._cut(entry, record.start, x, taps, layer)
        changes: dict[hosts.Role, Any] = {} if x is before else {hosts.HIDDEN: x}
        if self.block.rope is not None and rope is not None:
            if not again:
                record.rope = self._pass.rotary(rope, x.shape[0])
            if record.rope is not None:
                changes[self.block.rope] = record.rope
        return arguments.put(args, kwargs, changes) if changes else None

    def _check_input(self, module: nn.Module, x: Any) -> None:
        """What block 0 gets must be a row of tokens, or the hooks stand where this version does something else.

        Raises:
            PassError: it is a symbol, or a picture out of a batch that nobody sees whole.
            HostChanged: it is not `[B, L, C]`.
        """
        if not torch.compiler.is_compiling():
            refuse_symbols(x)
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.width:
            what = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise hosts.changed(module, f"its hidden states are {what}, where [B, L, {self.width}] is expected")

    def _check_masks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses masks: a tower's rows are whole pictures, and a method would take what a mask hides for patches.

        Raises:
            PassError: the blocks get a mask that hides something, or the causal switch.
        """
        mask = self.inputs[0].get(hosts.BIAS, args, kwargs)
        if self.inputs[0].get(hosts.CAUSAL, args, kwargs):
            raise PassError(
                f"the {self.stage} tower was called as a causal one; call the compressed model without that"
            )
        if mask is None or (self.masked and isinstance(mask, Tensor) and hides_nothing(mask)):
            return
        raise PassError(
            f"the {self.stage} tower was called with an attention mask that hides tokens (patches of padding, or your "
            "own); a compression cannot be combined with it: call the model without a mask, with pictures of one size"
        )

    def attend(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention pre-hook: adds log(size) to the logits, notes the input where q and k are computed again."""
        if self.reader.muted:
            return None
        again = replaying()
        record = (self._trained if again else self._pass).record(layer)
        arguments = self.attentions[layer]
        x = arguments.get(hosts.HIDDEN, args, kwargs)
        self._recognise(record, layer, x, again)
        if not again:
            record.taps.update(attn=module, row=self._pass.sequence.row, cuts=())
            record.moved = self._pass.sequence.cuts > 0 or self._pass.sequence.row.inserted > 0
            if self.block.q is None:
                record.taps["x"] = x
            if self.block.rope is not None:
                record.taps["rope"] = arguments.get(self.block.rope, args, kwargs)
            if layer >= self.proportional_from:
                record.bias = self._pass.sequence.key_bias(x.dtype)
        if record.bias is None or self.block.bias is None:
            # The host's own mask hides nothing (see `_check_masks`), but has the length of the whole row.
            if record.moved and arguments.get(hosts.BIAS, args, kwargs) is not None:
                return arguments.put(args, kwargs, {hosts.BIAS: None})
            return None
        bias = record.bias[:, 0, 0] if self.block.bias_rank == 2 else record.bias
        return arguments.put(args, kwargs, {self.block.bias: bias})

    def tap_q(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches q."""
        if not self.reader.muted and not replaying():
            self._pass.record(layer).taps["q"] = output

    def tap_k(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches k."""
        if not self.reader.muted and not replaying():
            self._pass.record(layer).taps["k"] = output

    def mid(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook between attention and MLP: hands the MLP branch the shorter row."""
        if self.reader.muted:
            return None
        full = self.middles[layer].get(hosts.HIDDEN, args, kwargs)
        if replaying():
            record = self._trained.record(layer)
            x = full
            for step in record.mid:
                x = step(x)
        else:
            record = self._pass.record(layer)
            # x1 would have no history here, and its gradient would be lost.
            if self._pass.grad and not torch.is_grad_enabled():
                raise PassError(
                    f"{self.stage}: gradients went off inside a block, as in reentrant gradient checkpointing; a merge "
                    "between attention and MLP needs use_reentrant=False"
                )
            record.mid = []
            self._carry(layer, self._taps(record, full, layer))
            x = full
            for entry in self.attachment.at(self.stage, layer, "mid"):
                x = self._cut(entry, record.mid, x, self._taps(record, x, layer), layer)
        if not record.mid:
            return None
        self._let_go(layer, record)
        if self._local(full, record):
            full.set_(x)
            return None
        record.full, record.merged = full, x
        return self.middles[layer].put(args, kwargs, {hosts.HIDDEN: x})

    def branch(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Hook on the end of the MLP branch: keeps its output aside, or puts it on the slots' places."""
        if self.reader.muted:
            return None
        again = replaying()
        record = (self._trained if again else self._pass).record(layer)
        if not record.mid or record.full is None:
            return None
        if not self._whole(record.full, module):
            record.branch = output
            return output.new_zeros(1)
        kept = self._kept(record.mid)
        index = kept.unsqueeze(-1).expand(-1, -1, output.shape[-1])
        room = output.new_zeros(output.shape[0], record.full.shape[1], output.shape[-1])
        return room.scatter(1, index, output)

    def end(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Block hook: closes the merge, reduces at ``end``, takes inserted tokens off."""
        if self.reader.muted:
            return None
        again = replaying()
        run = self._trained if again else self._pass
        record = run.record(layer)
        out = host_objects.hidden_of(module, output)
        before = out
        if record.mid and record.merged is not None and record.full is not None:
            if record.branch is not None:
                out = record.merged + record.branch
            else:
                kept = self._kept(record.mid).unsqueeze(-1).expand_as(record.merged)
                out = out.gather(1, kept) + (record.merged - record.full.gather(1, kept))
        elif not again and layer in self.tapped and not self.attachment.at(self.stage, layer, "mid"):
            self._carry(layer, self._taps(record, out, layer))
        sequence = run.sequence
        if again:
            for step in record.end:
                out = step(out)
            if record.inserted:
                out = out[:, : out.shape[1] - record.inserted]
        else:
            if layer in self.tapped:
                self._carry_outputs(layer, out)
            record.end = []
            for entry in self.attachment.at(self.stage, layer, "end"):
                out = self._cut(entry, record.end, out, self._taps(record, out, layer), layer)
            if sequence.row.inserted:
                out = self._take_off(record, out)
        if self.spread and layer == self.last and sequence.cuts:
            out = self._spread(run, out, again)
        record.taps.clear()
        record.branch = record.merged = record.full = None
        if out is before:
            return None
        return host_objects.with_hidden(output, out)

    def _let_go(self, layer: int, record: LayerRecord) -> None:
        """Drops what was caught of the attention where nobody asks for it any more: memory that the MLP can use."""
        if not self.attachment.at(self.stage, layer, "end"):
            for name in ("q", "k", "x", "rope"):
                record.taps.pop(name, None)

    @staticmethod
    def _local(x: Tensor, record: LayerRecord) -> bool:
        """Whether `x` is the block's own, a plain tensor without history, so that it can be given other contents."""
        return (
            not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and type(x) is Tensor
            and id(x) != record.taps.get("block")
            and not (x.requires_grad or x._is_view())
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        )

    # ------------------------------------------------------------------ passes
    @property
    def _pass(self) -> Pass:
        current = self.running.mine().current
        if current is None:
            raise PassError(
                f"{self.stage}: a block ran without block 0 before it in this thread; a pass starts at block 0"
            )
        return current

    @property
    def current(self) -> Pass | None:
        """The last pass: of this thread, or else of the one that ran last."""
        return self.running.seen().current

    @property
    def _trained(self) -> Pass:
        # Autograd may run a block again in a thread of its own; `same_forward` tells whether it is this pass.
        trained = self.running.mine().trained or self.last_trained
        if trained is None:
            raise PassError(f"{self.stage}: autograd runs a block again that never ran with gradients before")
        return trained

    def _begin(self, x: Tensor) -> None:
        """Starts the state of a forward."""
        run = StageRun(self.stage, x.shape[0], x.shape[1])
        if torch.compiler.is_compiling():
            self.attachment.compiled = True  # no books: each number in them would be a guard, and a call a new graph
        else:
            self.running.mine().watch.begin()
            self.attachment.ledger.begin(run)
        n = x.shape[1] - self.num_prefix
        source = None
        if self.attachment.trace or self.spread:
            source = torch.arange(n, device=x.device).expand(x.shape[0], n)
        sequence = Sequence(Row(self.num_prefix, n), n, source=source, follow=self.follow)
        self._run(Pass(sequence, run, grid=self._grid(n), grad=torch.is_grad_enabled()))

    def _run(self, started: Pass) -> None:
        """A pass runs in this thread from now on."""
        running = self.running.mine()
        running.current = started
        if started.grad:
            running.trained = self.last_trained = started

    def _grid(self, n: int) -> tuple[int, int] | None:
        """Rows and columns of the `n` patches of this pass, from the map of its pixels; None where they do not fit."""
        running = self.running.mine()
        grid, running.map = running.map if self.stem else self.configured, None
        return grid if grid is not None and grid[0] * grid[1] == n else None

    def _enter(self, layer: int) -> LayerRecord:
        if not torch.compiler.is_compiling():
            self.running.mine().watch.enter(layer)
        return self._pass.record(layer)

    def _replay(self, layer: int, x: Tensor) -> LayerRecord:
        """A block that autograd runs again: its record, after a look whether it is the same forward."""
        record = self._trained.record(layer)
        same_forward(record.probe, x)
        self.running.mine().known = layer
        return record

    def _recognise(self, record: LayerRecord, layer: int, x: Tensor, again: bool) -> None:
        """The same look for hosts that run only the inside of a block again."""
        running = self.running.mine()
        if not again:
            record.inner = probe(x) if self._pass.grad else None
        elif running.known == layer:
            running.known = -1  # its start has been looked at
        else:
            same_forward(record.inner, x)

    def _whole(self, x: Tensor, module: nn.Module) -> bool:
        """Whether the merge must pass through the block's own output."""
        # torch.jit.trace compares what it saw with and without gradients, so that both must go the same way.
        always = self.block.through or module.training or torch.jit.is_tracing()
        return always or (torch.is_grad_enabled() and x.requires_grad)

    def notes(self, method: int, scope: str) -> MutableMapping[str, Any]:
        """What a method noted during the last forward."""
        found: MutableMapping[str, Any] = self._pass.sequence.note(method, scope)
        return found

    # ------------------------------------------------------------------ cutting
    def _cut(self, entry: Entry, record: list[Any], x: Tensor, taps: TowerTaps, layer: int) -> Tensor:
        """Shows a view to a method and shortens the row as it says."""
        sequence = self._pass.sequence
        taps.inserted = sequence.outputs.get(entry.index)
        view = self._view(entry, taps)
        reduction = self.attachment.decide(entry, view)
        row = sequence.row
        if reduction is not None:
            self._check_maps()
            asks = layer + (entry.site.point != "start")  # the first layer that attends to what is left
            x, step = sequence.take(reduction, x, biased=self.proportional_from <= asks < self.depth)
            record.append(step)
            caught = self._pass.record(layer).taps
            caught["cuts"] = (*caught.get("cuts", ()), reduction)
            if sequence.source is not None:
                self._pass.steps.append((entry.site, sequence.source))
        if not torch.compiler.is_compiling():
            group = Group(x.shape[0], row.n, sequence.row.n, sequence.entered, 0, row.length)
            kind = "observe" if reduction is None else "cut"
            event = Event(
                self.stage, layer, entry.site.point, entry.index, kind, row.length, sequence.row.length, (group,)
            )
            self.attachment.ledger.visit(self._pass.run, event)
        return x

    def _check_maps(self) -> None:
        """Refuses the first cut of a call that lays the rows of its blocks out as maps.

        No hook stands where that is done, and shortened rows fill a map of another size without an error where the
        numbers divide: so the callers are asked. Compiled code has none.

        Raises:
            PassError: one of them collects maps.
        """
        if not self.maps or self._pass.sequence.cuts or torch.compiler.is_compiling():
            return
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code in self.maps:
                asked = next((frame.f_locals[name] for name in hosts.MAPS.names if name in frame.f_locals), None)
                if asked != "NLC":
                    raise PassError(
                        f"{frame.f_code.co_name} was asked for maps ({asked}), and the rows of a compressed model are "
                        f"no grid any more; ask for rows ({hosts.MAPS.names[0]}='NLC'), and bring them back with "
                        "Compression.trace()[i].restore(rows, layer)"
                    )
                return
            frame = frame.f_back

    def _view(self, entry: Entry, taps: TowerTaps) -> TokenView:
        sequence = self._pass.sequence
        signals: dict[str, Signal] = {}
        for need in entry.needs:
            signals[need.key] = self._signal(need, taps)
        view = TokenView(
            sequence.row.inner(taps.tokens.detach(), 1),
            entry.site,
            size=sequence.view_size(),
            num_prefix=self.num_prefix,
            depth=self.depth,
            grid=self._pass.grid,
            entered=sequence.entered,
            signals=signals,
            state=sequence.state(entry.index),
            row=sequence.note(entry.index, entry.scope),
            memory=self.attachment.remember(entry.index),
        )
        self.attachment.bind_user(view, signals)
        return view

    def _signal(self, need: Need, taps: TowerTaps) -> Signal:
        if need.stage is not None:
            return self._pass.sequence.carried.get(f"{need.name}@{need.layer}", (None, None))[0]
        if need.name not in TOWER_SIGNALS:
            return None  # the user's; bound when the view exists
        return lambda: tower_signal(need.name, taps)

    def _carry(self, layer: int, taps: TowerTaps) -> None:
        """Derives what later sites wait for, while q and k of this layer are at hand."""
        for need in self.tapped.get(layer, ()):
            signal = TOWER_SIGNALS[need.name]
            if need.name in ("protected", "inserted"):
                continue  # of the block's output
            with torch.no_grad():
                self._pass.sequence.carried[f"{need.name}@{layer}"] = (signal.make(taps), signal.axis)

    def _carry_outputs(self, layer: int, out: Tensor) -> None:
        """The same for signals of the block's output."""
        sequence = self._pass.sequence
        for need in self.tapped.get(layer, ()):
            if need.name == "protected":
                sequence.carried[f"protected@{layer}"] = (sequence.row.guard(out, 1), None)

    def _insert(self, entry: Entry, record: LayerRecord, x: Tensor, taps: TowerTaps) -> Tensor:
        """Asks a method for tokens and puts them at the end of the row; gradients flow."""
        sequence = self._pass.sequence
        taps.inserted = sequence.outputs.get(entry.index)
        tokens = entry.method.insert(self._view(entry, taps))
        if tokens is None or tokens.shape[1] == 0:
            return x
        before = sequence.row.length
        sequence.insert(tokens.shape[1])
        record.taps.setdefault("owners", []).append((entry.index, tokens.shape[1]))
        tokens = tokens.to(x.dtype)
        record.start.append(tokens)
        record.inserted += tokens.shape[1]
        if not torch.compiler.is_compiling():
            event = Event(self.stage, entry.site.layer, "start", entry.index, "insert", before, sequence.row.length)
            self.attachment.ledger.visit(self._pass.run, event)
        return torch.cat([x, tokens], 1)

    def _take_off(self, record: LayerRecord, out: Tensor) -> Tensor:
        """Inserted tokens leave; their outputs are a signal of the next insert."""
        sequence = self._pass.sequence
        at = sequence.row.prefix + sequence.row.n
        place = at
        for index, count in record.taps.get("owners", ()):
            sequence.outputs[index] = out[:, place : place + count]
            place += count
        sequence.discard()
        return out[:, :at]

    def _spread(self, run: Pass, out: Tensor, again: bool) -> Tensor:
        """Every patch gets its slot's features, zeros where it was dropped; the row is whole again."""
        sequence = run.sequence
        source = sequence.source
        whole = _spread_out(out[:, self.num_prefix :], source, 1)
        if not again:
            before = sequence.row.length
            carried = {
                name: (_spread_out(value, source, axis), axis)
                for name, (value, axis) in sequence.carried.items()
                if value is not None and axis is not None
            }
            sequence.restore()
            sequence.carried.update(carried)
            if not torch.compiler.is_compiling():
                event = Event(self.stage, self.last, "end", -1, "spread", before, sequence.row.length)
                self.attachment.ledger.visit(run.run, event)
        return torch.cat([out[:, : self.num_prefix], whole], 1)

    # ------------------------------------------------------------------ taps
    def _taps(self, record: LayerRecord, x: Tensor, layer: int) -> TowerTaps:
        """Taps of the block that runs now."""
        return self.reader.inside(self._pass, record, x, self._bias(x, layer, record))

    def _ahead(self, layer: int, module: nn.Module, x: Tensor, rope: Tensor | None) -> TowerTaps:
        """Taps of a block that has not run yet; `rope` is the rotary table that the host gives it."""
        return self.reader.ahead(self._pass, module, x, self._bias(x, layer), rope)

    def _bias(self, x: Tensor, layer: int, record: LayerRecord | None = None) -> Tensor | None:
        """What a block adds to its logits: the one that runs and has this record, or one that has not run yet."""
        if record is not None:
            return record.bias
        bias: Tensor | None = self._pass.sequence.key_bias(x.dtype) if layer >= self.proportional_from else None
        return bias

    @staticmethod
    def _kept(steps: list[Any]) -> Tensor:
        """S of several steps in a row: the place of each last slot's own token."""
        kept: Tensor = steps[0].kept
        for step in steps[1:]:
            kept = kept.gather(1, step.kept)
        return kept


def refuse_symbols(x: Any) -> None:
    """Refuses what stands for tokens in transforms that hooks cannot follow.

    Raises:
        PassError: symbols of torch.fx, or pictures of a batch that torch.func.vmap hides.
    """
    if isinstance(x, torch.fx.Proxy):
        raise PassError(
            "torch.fx.symbolic_trace gives symbols, and what a method keeps depends on the tokens; trace the model "
            "without the compression, or take torch.export, which follows it"
        )
    functorch = torch._C._functorch
    while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise PassError(
                "torch.func.vmap hides the batch from the hooks, so that what is kept cannot be chosen picture by "
                "picture; call the compressed model with the whole batch"
            )
        x = functorch.get_unwrapped(x)


def hides_nothing(mask: Tensor) -> bool:
    """Whether a mask lets every token see every other; compiled code looks when it runs, and stops there."""
    seen = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    if torch.compiler.is_compiling():
        torch._assert_async(seen, "an attention mask hides tokens of a compressed tower")
        return True
    return bool(seen)


def _spread_out(value: Tensor, source: Tensor, axis: int) -> Tensor:
    """Rows or a signal of slots as those of patches: every patch has that of its slot, 0 where it was dropped."""
    shape = [1] * value.dim()
    shape[0], shape[axis] = source.shape
    index = source.reshape(shape).expand(*value.shape[:axis], source.shape[1], *value.shape[axis + 1 :])
    return value.gather(axis, index.clamp(min=0)) * (index >= 0).to(value.dtype)
