"""What is noted of caches while layers run: the rows that each had, and the attention that entries received."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...core.attachment import Attachment, Entry
from ...core.cache_signals import apart, masses, queries, recent_rows
from ...core.hooks import replaying
from ...core.ledger import Mass
from ...core.signals import MASSES
from ...core.site import Site
from ...core.stream import Segment
from ...core.threads import PerThread
from .. import host_objects
from .attention import attention_form
from .call import Brought, Call, DecoderRun
from .segments import Segments
from .taps import LayerTaps, mask_of

RECENT = "recent rows"
"""Name, among masses, of the attention of single rows, `[B, L, Hkv, w]`; their sum is ``recent_mass``."""


class CacheWatch:
    """Notes what methods of caches will ask for, while the queries of a layer are at hand.

    Args:
        attachment: whose methods.
        lm: gives the text model; a weak reference.
        segments: of the layers.
        running: what each thread runs.
        entries: methods by layer.
    """

    def __init__(
        self,
        attachment: Attachment,
        lm: Callable[[], Any],
        segments: Segments,
        running: PerThread[DecoderRun],
        entries: Mapping[int, Entry],
    ) -> None:
        self.attachment = attachment
        self.lm = lm
        self.segments = segments
        self.running = running
        self.entries = entries

    def reads(self, layer: int) -> bool:
        """Whether a method asks for attention that the entries of a layer received."""
        return layer in self.entries and bool(self._masses(layer))

    def _masses(self, layer: int) -> list[str]:
        return [need.name for need in self.entries[layer].needs if need.name in MASSES]

    def install(self, layers: Iterable[nn.Module]) -> None:
        """Hooks behind the layers whose caches methods see."""
        for layer, block in enumerate(layers):
            if layer in self.entries:
                self.attachment.hook(block, "post", self.after, layer)

    def after(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Layer hook: the rows as this layer had them, and the attention that they received."""
        running = self.running.mine()
        call = running.call
        if call is None or call.cache is None or running.muted or replaying():
            return
        with torch.no_grad():
            if call.rows is not None:
                self._prefill(call, layer, host_objects.hidden_of(module, output))
            elif call.tracked and self.reads(layer):
                call.attended[layer] = self._attended(call, layer, module)
        if not any(entry.site.point == "end" for entry in self.attachment.at("decoder", layer)):
            call.taps.pop(layer, None)

    # ------------------------------------------------------------------ a prefill
    def _prefill(self, call: Call, layer: int, hidden: Tensor) -> None:
        rows, site = call.rows, self.entries[layer].site
        assert rows is not None
        shot = replace(rows, pictures=[replace(picture) for picture in rows.pictures], carried=dict(rows.carried))
        names = self._masses(layer)
        call.brought[layer] = Brought(shot, self._sums(names, site, call, layer, hidden) if names else {})

    def _sums(self, names: list[str], site: Site, call: Call, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """Masses of `cache_signals`, fp32 `[B, L, Hkv, ...]`; padding and drafts give none and get none."""
        rows, window = call.rows, site.window
        assert rows is not None
        together, by_row = apart(names, site.every)
        keys = host_objects.keys_in(self.lm().layers[layer], call.cache, layer)
        heads, seen = keys.shape[1], keys.shape[2]
        shapes: dict[str, tuple[int, ...]] = {**dict.fromkeys(together, ()), **({RECENT: (window,)} if by_row else {})}
        tables = {
            name: torch.zeros(rows.batch, rows.length, heads, *more, dtype=torch.float32, device=keys.device)
            for name, more in shapes.items()
        }
        taps = LayerTaps(self.lm, self.segments, self.running, call, layer + 1, None, hidden, None, None, Segment(0))
        for group in rows.groups("sample", by_text=True, by_length=True):
            of = taps.behind(group)
            length, text = of.here.shape[1], of.text.shape[1]
            found = masses(together, of, heads, window) if together else {}
            _book(call, layer, len(group.units), queries(together, length, text, window), seen)
            if by_row:
                found[RECENT] = recent_rows(of, heads, window)
                _book(call, layer, len(group.units), min(window, length), seen)
            columns = rows.valid_columns(group)
            if columns is None:
                columns = torch.arange(rows.length, device=keys.device).expand(len(group.units), -1)
            for name, sums in found.items():
                tables[name][group.index[:, None], columns[:, :length]] = sums.transpose(1, 2)
        if by_row:
            tables["recent_mass"] = tables[RECENT].sum(3)
        return tables

    # ------------------------------------------------------------------ behind a prefill
    def _attended(self, call: Call, layer: int, module: Any) -> Tensor:
        """Attention of the rows of a call without pictures, fp32 `[B, past + R, Hkv, R]`; padding gives none."""
        caught, stream = call.taps[layer], call.stream
        form = attention_form(module)
        assert form is not None and stream is not None  # the layout offers masses elsewhere alone
        k = host_objects.keys_in(module, call.cache, layer)
        made = form.heads(caught["q"], "q")
        batch, _, rows = made.shape[:3]
        past = k.shape[2] - rows
        columns = torch.arange(past, k.shape[2], device=k.device).expand(batch, -1)
        q = form.rotate(made, caught["rotary"], columns)
        segment = stream.segment(layer)
        count, new, _ = call.added.get(segment.first, call.added[0])
        real = segment.extended(count, new, batch, k.device)
        real = None if real is None else real[:, -k.shape[2] :]
        bias = kernels.row_bias(columns, k.shape[2], valid=real, mask=mask_of(caught["mask"], k.shape[2]))
        scale = float(form.attn.scaling)
        _book(call, layer, batch, rows, k.shape[2])
        attention = kernels.attention_rows(q, k, scale=scale, bias=bias, cap=form.cap)
        if new is not None:
            attention = attention * new[:, None, -rows:, None]
        return kernels.per_key_head(attention, k.shape[1]).permute(0, 3, 1, 2)


def _book(call: Call, layer: int, rows: int, summed: int, keys: int) -> None:
    """Notes what was summed; decode steps have no page of their own, and are counted by their number."""
    if call.run is not None and summed:
        call.run.masses.append(Mass(layer, rows, summed, keys))
