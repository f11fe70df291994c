"""Text towers of dual encoders: the same surgery, with the token that the head reads anywhere in the row.

The end-of-text token moves as tokens leave, padding (where a mask hides it) differs from row to row, and the causal
mask must fit what is left. Before the final norm the rows get their original length back, so that hosts find the
end-of-text token at its place.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.signals import tower_signals
from ...core.site import StageLayout
from .. import hosts
from ..base import TextSpec, TowerSpec
from ..hosts import Arguments
from .biased import note_biased
from .checks import check_graph
from .sized_attention import check_masks
from .text_cutting import TextCuts
from .text_intake import TextIntake
from .text_state import TextState
from .tower import Tower


class TextTower(Tower):
    """Drives one text tower."""

    masks_follow = True

    def __init__(self, attachment: Attachment, spec: TextSpec) -> None:
        self.causal = spec.causal
        self.mask = spec.mask
        intake = TextIntake(attachment, spec)
        tower = TowerSpec(spec.block, spec.blocks, 0, spec.width, spec.heads, stage="text")
        super().__init__(attachment, tower, intake, TextCuts(attachment, len(spec.blocks), spec.causal))
        if self.entries:
            self.normed = Arguments(spec.norm, [hosts.HIDDEN])
            attachment.hook(spec.ids, "pre", intake.read)
            attachment.hook(spec.norm, "pre", self.restore)

    @staticmethod
    def text_layout(spec: TextSpec) -> StageLayout:
        """What a text tower offers to methods."""
        depth = len(spec.blocks)
        return StageLayout(
            depth, spec.width, spec.heads, depth - 1, frozenset({"start", "mid", "end"}), tower_signals(1)
        )

    def attend(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention pre-hook: a mask that fits the rows, with log(size) where a method wants it."""
        if self.reader.muted:
            return None
        check_graph(self.flexible)
        again = replaying()
        record = self.running.of(again).record(layer)
        x = self.attentions[layer].get(hosts.HIDDEN, args, kwargs)
        self.running.recognise(record, layer, x, again)
        if not again:
            record.taps["attn"] = module
            if self.block.q is None:
                record.taps["x"] = x
            state: TextState = self.running.now.sequence
            size = state.rows.size if layer >= self.cuts.proportional_from else None
            record.bias = None
            if state.changed or size is not None:
                record.bias = state.mask(x.dtype, self.causal, size)
        if record.bias is None:
            return None
        if not again:
            note_biased(module, x, self.block.heads, record.bias, size is not None)
        if layer in self.sized:  # the causal mask goes with the sizes; the host's is one of the whole rows
            return self.attentions[layer].put(args, kwargs, {self.mask: None})
        check_masks(module)
        mask = record.bias
        if self.block.bias_rank == 2:  # nn.MultiheadAttention takes [L, L] or one for each row and head
            mask = (
                mask[0, 0] if mask.shape[0] == 1 else mask.repeat_interleave(getattr(module, self.block.heads), 0)[:, 0]
            )
        return self.attentions[layer].put(args, kwargs, {self.mask: mask})

    def restore(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the final norm: rows get their original length back."""
        current = self.running.mine
        if current is None or replaying() or not current.sequence.changed:
            return None
        state: TextState = current.sequence
        x = self.normed.get(hosts.HIDDEN, args, kwargs)
        return self.normed.put(args, kwargs, {hosts.HIDDEN: state.rows.restore(x, state.entered)})

    def notes(self, method: int, scope: str) -> MutableMapping[str, Any]:
        """What a method noted during the last forward, rows of all groups together."""
        notes = self.running.now.sequence.rows.notes.get((method, scope), {})
        joined: dict[str, Any] = {}
        for name, by_row in notes.items():
            values = [by_row[unit] for unit in sorted(by_row)]
            joined[name] = torch.stack(values) if all(isinstance(v, Tensor) for v in values) else values[0]
        return joined
