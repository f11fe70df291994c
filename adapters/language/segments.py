"""What the layers of each segment get and leave behind: masks, position ids and embeddings, the past that is filed.

A segment is a run of layers whose caches hold the same columns (see `stream`). Hosts hand all layers the same mask and
position embeddings; those of a segment behind a cut are made here, once a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.stream import Segment, Stream
from ...errors import UnsupportedModel
from .. import hosts
from ..hosts import Role
from .call import BLOCKS, HOST, Call, Incoming, SegmentCall
from .masks import block_ids, build_mask, check_mask, weighed
from .rotary import gather_rotary, last_of
from .spec import VLMSpec


class Segments:
    """Masks and positions of a language model's layers.

    Args:
        spec: the family.
        lm: gives the text model; a weak reference.
        kinds: type of each layer.
    """

    def __init__(self, spec: VLMSpec, lm: Callable[[], Any], kinds: list[str]) -> None:
        self.spec = spec
        self.lm = lm
        self.kinds = kinds
        self.rule = spec.block
        if self.rule is not None and self.rule.when is not None:
            name, value = self.rule.when
            self.rule = self.rule if getattr(lm().config, name, None) == value else None
        self.typed = False

    def check(self, first: int) -> None:
        """Looks, before a hook is placed, whether the host's own functions take what they will be handed.

        Args:
            first: layer behind which rows are cut, or the number of layers.

        Raises:
            UnsupportedModel: one of them takes something else.
        """
        outer = self.spec.mask != "2d"
        for kind in dict.fromkeys(self.kinds if outer else self.kinds[first:]):
            check_mask(kind, self.rule)
        if first < len(self.kinds):
            rotary = getattr(self.lm(), "rotary_emb", None)
            if rotary is None:
                raise UnsupportedModel(
                    f"{type(self.lm()).__name__} of {hosts.library_of(self.lm())} has no module rotary_emb, by which "
                    "positions behind a cut are turned"
                )
            self.typed = hosts.Arguments(rotary, [hosts.POSITIONS], [hosts.LAYER_TYPE]).has(hosts.LAYER_TYPE)

    def blocks(self, incoming: Incoming, columns: int, held: int, stream: Stream | None) -> Tensor | None:
        """Bidirectional blocks of a call's columns, int64 `[B, S]`, or None.

        Args:
            incoming: what the call came with.
            columns: S.
            held: columns that the cache holds.
            stream: the past, or None.
        """
        if self.rule is None or incoming.types is None or (self.rule.first_only and held):
            return None
        first = held if stream is None else stream.seen
        return block_ids(incoming.types, self.rule, first)

    # ------------------------------------------------------------------ the first segment
    def enter(self, call: Call, stream: Stream, x: Tensor, given: Any) -> dict[Role, Any]:
        """Embeddings, positions and the mask that the text model gets.

        Args:
            call: this call.
            stream: its past.
            x: `[B, L, C]`, the rows.
            given: the mask that it got.

        Returns:
            The arguments that fit the rows.
        """
        segment, rows = stream.segments[0], call.rows
        changes: dict[Role, Any] = {hosts.EMBEDDINGS: x, hosts.POSITIONS: _positions(call, segment)}
        if rows is not None:
            for role in self.spec.gather:
                if (HOST, role.what) in rows.states:
                    changes[role] = rows.states[HOST, role.what]
        count, new, blocks = call.added[0]
        valid = segment.extended(count, new, x.shape[0], x.device)
        mask: Any
        if self.spec.mask != "2d":
            blocks = segment.extended_blocks(count, blocks, x.shape[0], x.device)
            mask = self._outer_masks(call, x, valid, blocks, given)
        elif valid is not None:
            mask = valid.to(torch.int64)
        elif call.cache is not None:
            mask = None
        else:
            # Without a cache, position gaps and no mask read as packed sequences: say that all columns are one.
            mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        return {**changes, hosts.MASK: mask}

    def _outer_masks(self, call: Call, x: Tensor, valid: Tensor | None, blocks: Tensor | None, given: Any) -> Any:
        """Masks of hosts that build them outside the text model, in the container they came in."""
        config = self.lm().config

        def build(kind: str) -> Any:
            layer = self.kinds.index(kind)
            return build_mask(config, kind, x, valid, call.cache, layer, blocks, self.rule, explicit=call.cache is None)

        if isinstance(given, dict) or len(set(self.kinds)) > 1:
            return {kind: build(kind) for kind in dict.fromkeys(self.kinds)}
        return build(self.kinds[0])

    # ------------------------------------------------------------------ later segments
    def mask(self, call: Call, segment: Segment, layer: int, hidden: Tensor) -> Any:
        """The mask of a layer behind a cut; made once a segment and layer type.

        Args:
            call: this call, with the segment begun.
            segment: whose rows.
            layer: the layer.
            hidden: `[B, L, C]`, its input.
        """
        part, kind = call.segments[segment.first], self.kinds[layer]
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
                explicit=hidden.shape[1] != count or segment.bias is not None,
            )
        mask = part.masks[kind]
        if segment.bias is not None:
            mask = weighed(mask, segment.bias, hidden.dtype, self.lm().config.num_attention_heads)
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] != hidden.shape[1]:
            return mask[:, :, -hidden.shape[1] :]
        return mask

    def own_mask(self, call: Call, segment: Segment, layer: int, hidden: Tensor) -> Any:
        """The mask that a layer would get if its rows began a segment here; None where it sees all that came before.

        Args:
            call: this call, with pictures.
            segment: its past.
            layer: the layer.
            hidden: `[B, L, C]`, its input.
        """
        kind, rows = self.kinds[layer], call.rows
        if rows is None or (kind == "full_attention" and self.rule is None):
            return None
        count, batch, device = hidden.shape[1], hidden.shape[0], hidden.device
        valid = segment.extended(count, rows.valid, batch, device)
        blocks = segment.extended_blocks(count, rows.states.get(BLOCKS), batch, device)
        return build_mask(self.lm().config, kind, hidden, valid, call.cache, layer, blocks, self.rule)

    def rotary(self, call: Call, segment: Segment, layer: int, given: Any, hidden: Tensor) -> Any:
        """Position embeddings of a layer behind a cut: the host's own, at the columns that are left.

        Args:
            call: this call, with the segment begun.
            segment: whose rows.
            layer: the layer.
            given: what the host hands the layer.
            hidden: `[B, L, C]`, its input.
        """
        part, kind = call.segments[segment.first], self.kinds[layer]
        if given is None:  # the host turns nothing in this layer
            return None
        if part.rotary is not None:
            if kind not in part.rotary:
                part.rotary[kind] = self.own_rotary(call, segment, layer, hidden)
            return last_of(part.rotary[kind], hidden.shape[1])
        if call.input_columns is None:
            return given
        first = given[0] if isinstance(given, (tuple, list)) else given
        if first.shape[1] != call.width:  # sliced by the host to its last queries
            return given
        key = id(given)
        if key not in call.gathered:
            call.gathered[key] = (given, gather_rotary(given, call.input_columns))
        return call.gathered[key][1]

    def own_rotary(self, call: Call, segment: Segment, layer: int, hidden: Tensor) -> Any:
        """Position embeddings of a layer at positions that a cut renumbered, or before the host has made any.

        Args:
            call: this call.
            segment: whose rows.
            layer: the layer.
            hidden: `[B, L, C]`, its input.
        """
        positions = _positions(call, segment)
        positions = positions[-3:] if positions.dim() == 3 else positions  # `generate` puts places in the row in front
        rotary = self.lm().rotary_emb
        return rotary(hidden, positions, self.kinds[layer]) if self.typed else rotary(hidden, positions)


def _positions(call: Call, segment: Segment) -> Tensor:
    """Positions of a segment's rows, int64 `[..., B, L]`."""
    if call.rows is not None:
        return call.rows.positions
    assert call.positions is not None
    return call.positions if segment.shift is None else call.positions - segment.shift[:, None]


def begin_segment(call: Call, segment: Segment, hidden: Tensor) -> None:
    """A segment begins in this call: validity and positions of its rows.

    Args:
        call: this call.
        segment: the segment, as its caches were before.
        hidden: `[B, L, C]`, input of its first layer.
    """
    count, rows = hidden.shape[1], call.rows
    if rows is None:
        new, blocks = call.added[0][1:]
    else:
        new, blocks = rows.valid, rows.states.get(BLOCKS)
    call.added[segment.first] = (count, new, blocks)
    call.drop_by_segment[segment.first] = call.position_drop
    batch, device = hidden.shape[0], hidden.device
    call.segments[segment.first] = SegmentCall(
        {} if segment.renumbered else None,
        segment.extended(count, new, batch, device),
        segment.extended_blocks(count, blocks, batch, device),
    )


def end_call(call: Call, stream: Stream, device: torch.device) -> None:
    """What this call added is past now.

    Args:
        call: the call, which ran.
        stream: its past, brought up to date.
        device: of the rows.
    """
    for first, segment in stream.segments.items():
        count, new, blocks = call.added.get(first, call.added[0])
        valid = segment.extended(count, new, stream.rows, device)
        segment.blocks = segment.extended_blocks(count, blocks, stream.rows, device)
        segment.valid = valid
        segment.length += count
        if segment.bias is not None:
            segment.bias = F.pad(segment.bias, (0, count))
        drop = call.drop_by_segment.get(first, call.position_drop)
        if drop is not None:
            segment.shift = drop if segment.shift is None else segment.shift + drop
    stream.seen += call.columns
    stream.croppable += call.columns
    if call.rows is not None:
        # The last picture of a row wins.
        last = {picture.row: picture.text_after_last + call.rows.drafts for picture in call.rows.pictures}
        stream.croppable = min(last.values())
    stream.next, stream.follows = call.next, call.follows
