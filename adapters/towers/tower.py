"""The driver of a tower: hooks on its blocks show their rows to methods and shorten them, as `TowerSpec` says where.

How a row gets shorter in the middle of a block tells `mid_block`; what a method is shown and what becomes of its answer
tells `cutting`; which pass a hook belongs to tells `running`, and what begins one `intake`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.signals import PER_TOKEN, TowerTaps, tower_signals
from ...core.site import StageLayout
from .. import forms, host_objects, hosts
from ..base import TowerSpec, child
from ..hosts import Arguments, Host
from . import checks, mid_block
from .biased import note_biased
from .cutting import PictureCuts
from .hook_plan import BlockPlan, block_plans
from .intake import PictureIntake
from .pooling import install_pools
from .running import RunningPasses, probe
from .sized_attention import SizedAttention, check_masks
from .spreading import book_spread, spread
from .text_cutting import TextCuts
from .text_intake import TextIntake
from .tower_pass import LayerRecord, Pass, hiding
from .tower_taps import BlockTaps


class Tower:
    """Drives one tower: hooks call it with the layer, it asks the methods and shortens the row.

    Args:
        attachment: whose hooks and methods.
        spec: the tower as data.
        intake: what comes in, and
        cuts: what happens to the rows where methods act; None takes those of pictures.

    Attributes:
        running: the passes through it.
        reader: makes the taps of its blocks.
    """

    masks_follow = False
    """Whether attention masks must follow the rows, so that every layer behind a cut needs its hook."""

    def __init__(
        self,
        attachment: Attachment,
        spec: TowerSpec,
        intake: PictureIntake | TextIntake | None = None,
        cuts: PictureCuts | TextCuts | None = None,
    ) -> None:
        self.attachment = attachment
        self.stage = spec.stage
        self.block = spec.block
        self.num_prefix = spec.num_prefix
        self.last = spec.last % len(spec.blocks)
        self.returns_grid = spec.returns_grid
        self.rebuilds = spec.padded or spec.stage == "text"  # masks that hide something, for the rows that are left
        self.packed = spec.packed
        self.entries = attachment.at(self.stage)
        self.tapped = attachment.tapped(self.stage)
        self.running = RunningPasses(spec.stage)
        classed = self.stage == "text" or bool(spec.num_prefix and spec.has_class_token)
        self.reader = BlockTaps(spec.block, self.running, classed, self.rows)
        self.intake = PictureIntake(attachment, spec) if intake is None else intake
        self.cuts = PictureCuts(attachment, spec) if cuts is None else cuts
        self.flexible = any(forms.implementation(child(block, self.block.attn)) == forms.FLEX for block in spec.blocks)
        self.inputs: dict[int, Arguments] = {}
        self.attentions: dict[int, Arguments] = {}
        self.middles: dict[int, Arguments] = {}
        self.sized: set[int] = set()  # blocks whose attention asks what is added when it calls its function
        checks.check_key_bias(self.entries, spec)
        install_pools(attachment, spec, self.running)
        self._install(spec)

    # ------------------------------------------------------------------ layout and hooks
    @staticmethod
    def layout(spec: TowerSpec) -> StageLayout:
        """What a tower offers to methods."""
        why = forms.strange(spec)
        provides = tower_signals(spec.num_prefix if spec.has_class_token else 0, attention=not why)
        return StageLayout(
            depth=len(spec.blocks),
            width=spec.width,
            heads=spec.heads,
            last=spec.last % len(spec.blocks),
            points=frozenset({"start", "mid", "end"} if spec.packed is None else {"mid", "end"}),
            provides=provides & PER_TOKEN if spec.packed is not None else provides,
            num_prefix=spec.num_prefix,
            carries=spec.carries,
            why=why,
            whole=spec.whole,
            windowed=frozenset() if spec.packed is None else spec.packed.windowed,
            untried=_joined(spec.packed.merge) if spec.packed is not None else "",
        )

    def _install(self, spec: TowerSpec) -> None:
        """Hooks on the blocks that have something to do; block 0 starts the pass."""
        for plan in block_plans(self.attachment, spec, self.masks_follow):
            if plan.layer == 0 and spec.stem is not None:
                self.attachment.hook(spec.stem, "post", self.intake.embed)
            self._install_block(plan, spec.blocks[plan.layer])

    def _install_block(self, plan: BlockPlan, module: nn.Module) -> None:
        put, block, layer = self.attachment.hook, self.block, plan.layer
        attn = child(module, block.attn)
        wanted_of_block = [role for role in (hosts.HIDDEN, block.rope, block.bounds) if role]
        self.inputs[layer] = Arguments(module, wanted_of_block, [hosts.BIAS, hosts.CAUSAL])
        put(module, "pre", self.start, layer)
        if plan.attention:
            wanted_of_attention = [role for role in (hosts.HIDDEN, block.bias, block.rope) if role]
            self.attentions[layer] = Arguments(attn, wanted_of_attention, [hosts.BIAS])
            put(attn, "pre", self.attend, layer)
        if self._asks(plan, attn):
            SizedAttention(self.attachment).install(attn, lambda module, q, k: self.added(layer, q))
            self.sized.add(layer)
        if "q" in plan.projections and block.q is not None:
            put(child(attn, block.q), "post", self.reader.tap_q, layer)
        if "k" in plan.projections and block.k is not None:
            put(child(attn, block.k), "post", self.reader.tap_k, layer)
        if plan.mid:
            reader = child(module, block.mid)
            self.middles[layer] = Arguments(reader, [hosts.HIDDEN])
            put(reader, "pre", self.mid, layer)
            put(child(module, block.branch_end), "post", self.branch, layer)
        if plan.end:
            put(module, "post", self.end, layer)

    def _asks(self, plan: BlockPlan, attn: Host) -> bool:
        """Whether what is added to a block's logits cannot be given as its mask: no argument, or flex attention."""
        if self.block.bias is None:
            return plan.biased and self.block.by_name
        return (plan.biased or (plan.attention and self.rebuilds)) and forms.implementation(attn) == forms.FLEX

    # ------------------------------------------------------------------ hooks, in the order in which they run
    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Block pre-hook: begins the pass, inserts, reduces at ``start``, hands over the rotary table."""
        if self.reader.muted:
            return None
        checks.check_graph(self.flexible)
        again = replaying()
        arguments = self.inputs[layer]
        given = arguments.get(hosts.HIDDEN, args, kwargs)
        x = self.rows(given)
        rope = None if self.block.rope is None else arguments.get(self.block.rope, args, kwargs)
        if again:
            record = self.running.replay(layer, x)
        else:
            if layer == 0:
                self.running.begin(self.intake.begin(module, arguments, args, kwargs, self.running.watch))
            record = self.running.enter(layer)
            if self.running.now.grad:
                record.probe = probe(x)
        before = x
        if not torch.compiler.is_compiling():
            record.taps["block"] = id(given)
        if again:
            for step in record.start:
                x = torch.cat([x, step], 1) if isinstance(step, Tensor) else step(x)
        else:
            x = self._act_at_start(layer, module, record, x, rope)
        changes: dict[hosts.Role, Any] = {} if x is before else {hosts.HIDDEN: self.back(x, given)}
        if self.block.rope is not None and rope is not None:
            if not again:
                record.rope = self.running.now.rotary(rope, x.shape[0])
            if record.rope is not None:
                changes[self.block.rope] = record.rope
        changes.update(self.bounds(layer, record, arguments, args, kwargs, again))
        return arguments.put(args, kwargs, changes) if changes else None

    def _act_at_start(
        self, layer: int, module: nn.Module, record: LayerRecord, x: Tensor, rope: Tensor | None
    ) -> Tensor:
        """Methods at ``start`` put tokens in and cut the row."""
        record.start, record.inserted = [], 0
        for entry in self.attachment.at(self.stage, layer, "start"):
            taps = self._ahead(layer, module, x, rope)
            if entry.inserts:
                x = self.cuts.insert(self.running.now, entry, record, x, taps)
                taps = self._ahead(layer, module, x, rope)
            x = self.cuts.cut(self.running.now, entry, record.start, x, taps, layer)
        return x

    def attend(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention pre-hook: adds log(size) to the logits, notes the input where q and k are computed again."""
        if self.reader.muted:
            return None
        checks.check_graph(self.flexible)
        again = replaying()
        record = self.running.of(again).record(layer)
        arguments = self.attentions[layer]
        x = self.rows(arguments.get(hosts.HIDDEN, args, kwargs))
        self.running.recognise(record, layer, x, again)
        if not again:
            sequence = self.running.now.sequence
            shown = self.running.now.shown()
            record.taps.update(attn=module, row=sequence.row, cuts=(), visible=shown)
            record.moved = sequence.cuts > 0 or sequence.row.inserted > 0
            if self.block.q is None:
                record.taps["x"] = x
            if self.block.rope is not None:
                record.taps["rope"] = arguments.get(self.block.rope, args, kwargs)
            if layer >= self.cuts.proportional_from:
                record.bias = sequence.key_bias(x.dtype)
            record.shown = shown if record.moved or record.bias is not None else None
        if record.bias is not None or record.shown is not None:
            if layer not in self.sized:
                check_masks(module)
            if not again:
                note_biased(module, x, self.block.heads, record.bias, record.bias is not None)
        return self.masked(layer, record, x, arguments, args, kwargs)

    def masked(
        self,
        layer: int,
        record: LayerRecord,
        x: Tensor,
        arguments: Arguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The attention's arguments with the mask that fits its rows; None where the host's own does.

        Args:
            layer: of the block.
            record: of the layer.
            x: `[B, L, C]`, the attention's input.
            arguments: of the attention.
            args: of its call.
            kwargs: of its call.
        """
        if record.shown is not None and self.block.bias is not None and layer not in self.sized:
            bias = hiding(record.bias, record.shown, arguments.get(hosts.BIAS, args, kwargs), x.dtype)
            return arguments.put(args, kwargs, {self.block.bias: bias})
        if record.bias is None or self.block.bias is None or layer in self.sized:
            # The host's own mask hides nothing (see `visible_keys`), but has the length of the whole row.
            if record.moved and arguments.get(hosts.BIAS, args, kwargs) is not None:
                return arguments.put(args, kwargs, {hosts.BIAS: None})
            return None
        bias = record.bias[:, 0, 0] if self.block.bias_rank == 2 else record.bias
        return arguments.put(args, kwargs, {self.block.bias: bias})

    def added(self, layer: int, q: Tensor) -> Tensor | None:
        """What the attention that runs now adds to its logits, where it cannot be given as its mask.

        Args:
            layer: of the block.
            q: its queries, for the dtype.
        """
        record = self.running.of(replaying()).record(layer)
        if record.shown is None:
            return record.bias
        return hiding(record.bias, record.shown, None, q.dtype)

    def mid(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook between attention and MLP: hands the MLP branch the shorter row."""
        if self.reader.muted:
            return None
        checks.check_graph(self.flexible)
        given = self.middles[layer].get(hosts.HIDDEN, args, kwargs)
        x = full = self.rows(given)
        if replaying():
            record = self.running.trained.record(layer)
            for step in record.mid:
                x = step(x)
        else:
            record = self.running.now.record(layer)
            mid_block.check_history(self.stage, self.running.now)
            record.mid = []
            self.cuts.carry(self.running.now, layer, self._taps(record, full, layer))
            for entry in self.attachment.at(self.stage, layer, "mid"):
                x = self.cuts.cut(self.running.now, entry, record.mid, x, self._taps(record, x, layer), layer)
        if not record.mid:
            return None
        self._let_go(layer, record)
        if mid_block.can_be_set(given, record):
            given.set_(self.back(x, given))
            return None
        record.full, record.merged = full, x
        return self.middles[layer].put(args, kwargs, {hosts.HIDDEN: self.back(x, given)})

    def branch(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Hook on the end of the MLP branch: keeps its output aside, or puts it on the slots' places."""
        if self.reader.muted:
            return None
        record = self.running.of(replaying()).record(layer)
        if not record.mid or record.full is None:
            return None
        return self.back(mid_block.branch_output(record, module, self.rows(output), self.block.through), output)

    def end(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Block hook: closes the merge, reduces at ``end``, takes inserted tokens off."""
        if self.reader.muted:
            return None
        again = replaying()
        run = self.running.of(again)
        record = run.record(layer)
        given = host_objects.hidden_of(module, output, packed=self.packed is not None)
        out = before = self.rows(given)
        if mid_block.is_open(record):
            out = mid_block.close(record, out)
        elif not again and layer in self.tapped and not self.attachment.at(self.stage, layer, "mid"):
            self.cuts.carry(run, layer, self._taps(record, out, layer))
        if again:
            for step in record.end:
                out = step(out)
            if record.inserted:
                out = out[:, : out.shape[1] - record.inserted]
        else:
            out = self._act_at_end(layer, run, record, out)
        if self.returns_grid and layer == self.last and run.sequence.cuts:
            out = spread(run, out, self.num_prefix)
            if not again:
                book_spread(run, self.stage, layer, self.attachment.ledger)
        record.taps.clear()
        record.branch = record.merged = record.full = None
        return None if out is before else host_objects.with_hidden(output, self.back(out, given))

    def _act_at_end(self, layer: int, run: Pass, record: LayerRecord, out: Tensor) -> Tensor:
        """Methods at ``end`` cut the row; tokens that were put in leave it."""
        if layer in self.tapped:
            self.cuts.carry_outputs(run, layer, out)
        record.end = []
        for entry in self.attachment.at(self.stage, layer, "end"):
            out = self.cuts.cut(run, entry, record.end, out, self._taps(record, out, layer), layer)
        return self.cuts.take_off(run, record, out) if run.sequence.row.inserted else out

    def _let_go(self, layer: int, record: LayerRecord) -> None:
        """Drops what was caught of the attention where nobody asks for it any more: memory that the MLP can use."""
        if not self.attachment.at(self.stage, layer, "end"):
            for name in ("q", "k", "x", "rope"):
                record.taps.pop(name, None)

    # ------------------------------------------------------------------ rows of the host
    def rows(self, x: Tensor) -> Tensor:
        """What a host's module works on, as rows `[B, L, C]`."""
        return x

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """Rows in the host's own form, which is that of `like`."""
        return x

    def bounds(
        self,
        layer: int,
        record: LayerRecord,
        arguments: Arguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        again: bool,
    ) -> dict[hosts.Role, Any]:
        """Arguments of a block beside its rows that must follow them.

        Args:
            layer: of the block.
            record: of the layer.
            arguments: of the block.
            args: of its call.
            kwargs: of its call.
            again: whether autograd runs the block again.
        """
        return {}

    # ------------------------------------------------------------------ passes
    @property
    def current(self) -> Pass | None:
        """The last pass: of this thread, or else of the one that ran last."""
        return self.running.latest

    def notes(self, method: int, scope: str) -> MutableMapping[str, Any]:
        """What a method noted during the last forward."""
        found: MutableMapping[str, Any] = self.running.now.sequence.note(method, scope)
        return found

    # ------------------------------------------------------------------ taps
    def _taps(self, record: LayerRecord, x: Tensor, layer: int) -> TowerTaps:
        """Taps of the block that runs now."""
        run = self.running.now
        return self.reader.inside(run, record, x, self.cuts.bias(run, x, layer, record))

    def _ahead(self, layer: int, module: nn.Module, x: Tensor, rope: Tensor | None) -> TowerTaps:
        """Taps of a block that has not run yet; `rope` is the rotary table that the host gives it."""
        run = self.running.now
        return self.reader.ahead(run, module, x, self.cuts.bias(run, x, layer), rope)


def _joined(merge: int) -> str:
    """What becomes of patches behind a packed tower; empty where each goes on by itself."""
    return (
        f"are spread over patches again, of which the projector joins squares of {merge} x {merge}" if merge > 1 else ""
    )
