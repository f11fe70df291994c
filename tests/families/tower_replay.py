"""What a method decided in a tower, taken again on the bare tower by loops over its blocks' own modules.

For towers with one row a crop. A block is ``x + attention(norm(x))``, then ``x + mlp(norm(x))``; between the two,
before and behind them rows are mixed as the method said, log(size) is added to the keys where it wants that, and tokens
that it inserts live for one block. Behind the last block every patch gets what its slot has, or rows stay short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support.player import written_out
from torch import Tensor, nn
from vlmtok.adapters.language.families import ROWS

from vlmtok import Reduction

NORM1, ATTENTION = ("layer_norm1", "layernorm_before"), ("self_attn", "attention")
ROW_A_CROP = {
    *("llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3", "gemma3", "paligemma"),
    *("aya_vision", "cohere2_vision", "blip-2", "instructblip"),
}
"""Model types whose towers loops replay; where pictures share a row or are padded, tests of their own hold it."""
NORM2, SCALES = ("layer_norm2", "layernorm_after"), ("lambda_1", "lambda_2")


@dataclass(frozen=True)
class Event:
    """What happened at a block of a tower, or before its projector.

    Attributes:
        layer: of the block; None before the projector.
        point: ``start``, ``mid`` or ``end``.
        reduction: of the crops of a call, or
        inserted: tokens at the end of the row, `[crops, E, C]`.
        size: `[crops, N]`, what each token stands for.
    """

    layer: int | None
    point: str
    reduction: Reduction | None
    inserted: Tensor | None
    size: Tensor | None


def row_of(reduction: Reduction, row: int) -> Reduction:
    """One view row of a reduction."""
    names = ("keep", "src", "dst", "keep_weight", "src_weight", "valid")
    values = {name: getattr(reduction, name) for name in names}
    return Reduction(**{name: None if value is None else value[row : row + 1] for name, value in values.items()})


def part(module: nn.Module, names: Sequence[str]) -> Any:
    """The part that has one of these names."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def attended(attn: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """What an attention makes of rows `[B, N, C]`, with a bias `[B, 1, 1, N]` on the keys."""
    if bias is None:
        return attn(x)[0]
    if not hasattr(attn, "qkv"):
        return attn(x, attention_mask=bias)[0]
    # BLIP's takes no bias: softmax(q k + bias) v, written out.
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return attn.projection((weights @ v).transpose(1, 2).flatten(2))


class Replay:
    """A bare model whose tower takes the events of another run.

    Args:
        model: bare, eager.
        events: in the order in which they happened.
        prefix: tokens in front of the patches.
        last: the last block whose output is used.
        proportional: whether sizes count in attention.

    Attributes:
        counts: features that each picture has left, where rows stay short.
    """

    def __init__(
        self, model: Any, events: Sequence[Event], prefix: int, last: int, depth: int, proportional: bool
    ) -> None:
        row = ROWS[model.config.model_type]
        core = model.get_submodule(row.core) if row.core else model
        modules = core.get_submodule(row.tower).modules()
        self.blocks = next(m for m in modules if isinstance(m, nn.ModuleList) and len(m) == depth)
        self.projector = core.get_submodule(row.projector) if row.projector else None
        self.events, self.prefix, self.last, self.proportional = list(events), prefix, last, proportional
        self.spreads, self.slots = row.tower_cut == "spread", row.tower_cut == "slots"
        self.counts: list[int] = []

    @contextlib.contextmanager
    def on(self) -> Iterator[Replay]:
        """Context in which the model's tower goes through the events; all of them must happen."""
        for index, block in enumerate(self.blocks):
            block.forward = self._forward(index, block)
        hooks = [] if not self.slots else [self.projector.register_forward_pre_hook(self._features)]
        try:
            yield self
        finally:
            for block in self.blocks:
                del block.forward
            for hook in hooks:
                hook.remove()
        assert not self.events, f"{len(self.events)} events did not happen again"

    # ------------------------------------------------------------------ blocks
    def _forward(self, index: int, block: Any) -> Callable[..., Tensor]:
        bare = type(block).forward

        def forward(hidden_states: Tensor, *given: Any, **named: Any) -> Tensor:
            if index == 0:
                shape = hidden_states.shape[0], hidden_states.shape[1] - self.prefix
                self.size = torch.ones(shape)
                self.slot = torch.arange(shape[1]).expand(shape).clone()
            if index > self.last:
                return bare(block, hidden_states, *given, **named)
            mask = named.get("attention_mask", given[0] if given else None)
            assert mask is None or bool((mask == 0).all() or (mask.dtype == torch.bool and mask.all()))
            x, extra = self._inserted(index, hidden_states)
            x = self._cut(index, "start", x)
            scales = [getattr(block, name, 1.0) for name in SCALES]
            bias = None
            if self.proportional and bool((self.size != 1).any()):
                ones = torch.ones(len(x), self.prefix), torch.ones(len(x), extra)
                bias = torch.cat([ones[0], self.size, ones[1]], 1).log()[:, None, None]
            x = x + scales[0] * attended(part(block, ATTENTION), part(block, NORM1)(x), bias)
            x = self._cut(index, "mid", x)
            x = x + scales[1] * block.mlp(part(block, NORM2)(x))
            x = self._cut(index, "end", x)
            x = x[:, : x.shape[1] - extra]
            if index == self.last:
                self.fixed = x[:, : self.prefix]
                x = self._spread(x) if self.spreads else x
            return x

        return forward

    def _next(self, layer: int | None, point: str, inserts: bool = False) -> Event | None:
        if not self.events:
            return None
        event = self.events[0]
        if (event.layer, event.point, event.inserted is not None) != (layer, point, inserts):
            return None
        return self.events.pop(0)

    def _inserted(self, layer: int, x: Tensor) -> tuple[Tensor, int]:
        event = self._next(layer, "start", inserts=True)
        if event is None or event.inserted is None:
            return x, 0
        return torch.cat([x, event.inserted.to(x)], 1), event.inserted.shape[1]

    def _cut(self, layer: int, point: str, x: Tensor) -> Tensor:
        while (event := self._next(layer, point)) is not None:
            assert event.reduction is not None and event.size is not None
            torch.testing.assert_close(event.size, self.size)
            rows, sizes, slots = [], [], []
            n = self.size.shape[1]
            for at in range(len(x)):
                cut = written_out(row_of(event.reduction, at), self.size[at])
                own = torch.full((n,), -1)
                for slot, token in cut.own.nonzero().tolist():
                    own[token] = slot
                slots.append(torch.where(self.slot[at] < 0, -1, own[self.slot[at].clamp(min=0)]))
                sizes.append((cut.own @ self.size[at].double()).float())
                seen = slice(self.prefix, self.prefix + n)
                rows.append(torch.cat([x[at, : self.prefix], cut.tokens(x[at, seen]), x[at, self.prefix + n :]]))
            x, self.size, self.slot = torch.stack(rows), torch.stack(sizes), torch.stack(slots)
        return x

    def _spread(self, x: Tensor) -> Tensor:
        """Every patch with what its slot has; zeros where it was dropped."""
        patches = x[:, self.prefix :].gather(1, self.slot.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, : self.prefix], patches * (self.slot >= 0)[..., None]], 1)

    # ------------------------------------------------------------------ before the projector
    def _features(self, projector: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        """Slots of every picture, zeros behind them where others have more."""
        (x,) = given
        rows = list(x)
        while (event := self._next(None, "end")) is not None:
            assert event.reduction is not None and event.size is not None
            made = []
            for at, row in enumerate(rows):
                cut = written_out(row_of(event.reduction, at), event.size[at], self.prefix)
                tokens = torch.cat([row, self.fixed[at]])
                made.append(cut.tokens(tokens[: cut.mix.shape[1]]))
            rows = made
        self.counts += [len(row) for row in rows]
        return (nn.utils.rnn.pad_sequence(rows, batch_first=True),)
