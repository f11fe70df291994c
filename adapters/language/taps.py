"""What a boundary between two decoder layers shows: q, k, attention rows, states, without switching its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ...core.row_data import ColumnMap, Group
from ...core.signals import DecoderTaps
from ...core.stream import Segment
from ...core.threads import PerThread
from ...errors import PassError
from .. import host_objects
from .attention import AttentionForm, attention_form
from .call import Call, DecoderRun
from .layer_parts import final_norm
from .rotary import gather_rotary
from .segments import Segments


class LayerTaps:
    """Taps of the layer that ran last and of the one to come.

    Args:
        lm: gives the text model; a weak reference.
        segments: makes position embeddings of renumbered rows.
        running: what each thread runs; its taps are muted while a projection is asked.
        call: this call.
        layer: the layer to come.
        module: it.
        hidden: `[B, L, C]`, its input.
        rotary: position embeddings of these rows.
        mask: the mask it would get, or None where that is unknown.
        past: what its cache held before this call.
    """

    def __init__(
        self,
        lm: Callable[[], Any],
        segments: Segments,
        running: PerThread[DecoderRun],
        call: Call,
        layer: int,
        module: Any,
        hidden: Tensor,
        rotary: Any,
        mask: Any,
        past: Segment,
    ) -> None:
        self.lm = lm
        self.segments = segments
        self.running = running
        self.call = call
        self.layer = layer
        self.module = module
        self.hidden = hidden.detach()
        self.rotary = rotary
        self.mask = mask
        self.past = past
        self.back: list[Tensor] = []
        self.renumbered = False

    def follow(self, hidden: Tensor, moved: ColumnMap, renumbered: bool) -> None:
        """A method cut the rows here; the next one at this boundary sees what is left.

        Args:
            hidden: `[B, L, C]`, the rows that are left.
            moved: how their columns moved.
            renumbered: whether positions were renumbered here, so that the layer to come turns by others.
        """
        self.hidden = hidden.detach()
        self.renumbered = self.renumbered or renumbered
        self.rotary = gather_rotary(self.rotary, moved.source)
        self.mask = None
        self.back.append(moved.source)

    def behind(self, group: Group) -> DecoderTaps:
        """Taps of the layer before, from what it did."""
        layer = self.layer - 1
        caught = self.call.taps.get(layer, {})
        transition, active = caught.get("transition"), caught.get("active")
        if "q" not in caught:
            return self._taps(group, layer, None, None, None, None, transition, active)
        form = self._form(self.lm().layers[layer])
        pair = form.heads(caught["q"], "q"), form.heads(caught["k"], "k")
        return self._taps(group, layer, form, pair, caught["rotary"], caught["mask"], transition, active)

    def ahead(self, group: Group) -> DecoderTaps:
        """Taps of the layer to come, from its own norm and projections."""
        form = attention_form(self.module)
        rotary = self.rotary
        if self.renumbered and form is not None:
            rotary = self.segments.own_rotary(self.call, self.past, self.layer, self.hidden)
        if self.mask is None:
            self.mask = self.segments.own_mask(self.call, self.past, self.layer, self.hidden)
        return self._taps(group, self.layer, form, None, rotary, self.mask, None, None, ahead=True)

    @staticmethod
    def _form(block: Any) -> AttentionForm:
        """That of a layer whose taps were asked for; the layout offers them only where there is one."""
        form = attention_form(block)
        assert form is not None
        return form

    def _taps(
        self,
        group: Group,
        layer: int,
        form: AttentionForm | None,
        caught: tuple[Tensor, Tensor] | None,
        rotary: Any,
        mask: Any,
        transition: list[Tensor] | None,
        neurons: Tensor | None,
        ahead: bool = False,
    ) -> DecoderTaps:
        rows = self.call.rows
        assert rows is not None
        device = self.hidden.device
        now = rows.valid_columns(group)
        if now is None:
            now = torch.arange(rows.length, device=device).expand(len(group.units), rows.length)
        now = now[:, : now.shape[1] - rows.drafts]
        old = now  # columns as the layer had them
        if not ahead:
            for source in reversed(self.back):
                old = source[group.index].gather(1, old)
        visual = rows.relative(group, group.columns)
        text = rows.relative(group, rows.text_columns(group)) if group.text else visual[:, :0]
        change = None
        if transition is not None:
            table = torch.stack(transition, 1)[group.index]
            change = table.gather(3, old[:, None, None, :].expand(-1, 2, 2, -1))

        def normed(places: Tensor) -> Tensor:
            return self._normed(self.hidden[group.index[:, None], now.gather(1, places)])

        def active(places: Tensor) -> Tensor:
            if neurons is None:
                return _nothing()
            whole = neurons.reshape(len(self.hidden), -1, neurons.shape[-1])
            return whole[group.index[:, None], old.gather(1, places)]

        if form is None:
            return DecoderTaps(
                _nothing, _nothing, 1.0, _nothing, old, visual, text, group.mixed, change, None, normed, active
            )
        cached, held = self._cached(layer, group, ahead), self._before(ahead).length
        past = 0 if cached is None else cached.shape[2]
        length = self.hidden.shape[1] if caught is None else caught[1].shape[2]

        def q(places: Tensor) -> Tensor:
            columns = old.gather(1, places)
            if caught is not None:
                made = caught[0][group.index].gather(2, _rows_index(columns, caught[0]))
            else:
                made = self._project(form, self.hidden[group.index[:, None], columns], "q")
            return form.rotate(made, gather_rotary(rotary, columns, group.index), columns + held)

        def k() -> Tensor:
            made = caught[1] if caught is not None else self._project(form, self.hidden, "k")
            everything = torch.arange(length, device=device).expand(len(group.units), length)
            made = form.rotate(made[group.index], gather_rotary(rotary, everything, group.index))
            return made if cached is None else torch.cat([cached.to(made.dtype), made], 2)

        def told() -> tuple[Tensor | None, Tensor | None]:
            seen = mask_of(mask, past + length)
            if seen is None:
                real = self._real(group, length, ahead)
                return None, None if real is None else real[:, -past - length :]
            if seen.shape[0] > 1 and [row for row, *_ in group.units] != [*range(len(seen))]:
                seen = seen[group.index]
            return seen[:, :, :length], None

        def bias(places: Tensor) -> Tensor:
            seen, real = told()
            return kernels.row_bias(old.gather(1, places) + past, past + length, valid=real, mask=seen)

        scale = float(form.attn.scaling)
        return DecoderTaps(
            q, k, scale, bias, old + past, visual, text, group.mixed, change, form.cap, normed, active, told
        )

    def _before(self, ahead: bool) -> Segment:
        """What the tapped layer's cache held before this call."""
        if ahead:
            return self.past
        stream = self.call.stream
        return Segment(0) if stream is None else stream.segment(self.layer - 1)

    def _cached(self, layer: int, group: Group, ahead: bool) -> Tensor | None:
        """Keys that the layer's cache held before this call, after rope; a sliding cache holds the last ones only."""
        if not self._before(ahead).length or self.call.cache is None:
            return None
        if ahead:
            keys = host_objects.keys_in(self.module, self.call.cache, layer)
        else:
            keys = self.call.taps[layer]["past"]
        return keys[group.index] if keys.shape[2] else None

    def _real(self, group: Group, length: int, ahead: bool) -> Tensor | None:
        """Which keys are no padding, bool `[G, cached + length]`, or None where all are real."""
        rows = self.call.rows
        assert rows is not None
        segment = self._before(ahead)
        new = rows.valid
        if not ahead and self.back:
            new = self.call.added.get(segment.first, self.call.added[0])[1]
        joined = segment.extended(length, new, rows.batch, self.hidden.device)
        return None if joined is None else joined[group.index]

    def _normed(self, x: Tensor) -> Tensor:
        """States through the model's last norm, with taps muted."""
        norm = final_norm(self.lm())
        assert norm is not None  # the layout offers the signal only where there is one
        running = self.running.mine()
        running.muted = True
        try:
            found: Tensor = norm(x)
            return found
        finally:
            running.muted = False

    def _project(self, form: AttentionForm, x: Tensor, which: str) -> Tensor:
        """Queries or keys of a layer that has not run, before rope, with taps muted."""
        running = self.running.mine()
        running.muted = True
        try:
            return form.heads(form.projection(which)(form.before(x)), which)
        finally:
            running.muted = False


def mask_of(mask: Any, keys: int) -> Tensor | None:
    """What a layer's mask says of each row and key, or None where it says no more than causality and padding do.

    Args:
        mask: as the layer got it.
        keys: S, of which it may have more in front.

    Returns:
        Bool or floating `[B or 1, 1, L, S]`.
    """
    return mask[:, :1, :, -keys:] if isinstance(mask, Tensor) and mask.dim() == 4 else None


def _nothing(*_: Any) -> Tensor:
    raise PassError("this signal was not tapped")


def _rows_index(columns: Tensor, table: Tensor) -> Tensor:
    """Columns `[G, R]` as an index along dim 2 of `[G, H, L, d]`."""
    return columns[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
