"""Signals of a packed row: derived stretch by stretch, since tokens see those of their own window, frame or picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ...core.row_data import Group
from ...core.sequence import TowerRow
from ...core.signals import TOWER_SIGNALS, TowerTaps
from .packed_segments import Segments

MEANS_OF_ROWS = frozenset({"received_attention", "flat_attention"})
"""Signals that are means over the rows which see a token."""


def packed_signal(name: str, taps: TowerTaps, segments: Segments, span: str, guarded: bool = False) -> Tensor | None:
    """A signal of a packed row.

    Means over rows are taken over the rows of a frame, whatever a block sees of it: a sum over a window's rows divided
    by the window's length would favour patches of small windows.

    Args:
        name: of a tower's signal.
        taps: of the whole row `[1, S, C]`.
        segments: of that row.
        span: what a token of the block sees.
        guarded: whether a class token stands behind each stretch, which its patches see too.

    Returns:
        What the signal is of one row, `[1, ...]` with S tokens along its axis.
    """
    signal = TOWER_SIGNALS[name]
    if signal.axis is None:
        return None
    axis, found = signal.axis, None
    # The rotary table is one of the whole row, so that q and k are turned once, before they are taken apart.
    turn = (lambda x: x) if taps.rotate is None else taps.rotate
    turned = cache(lambda which: turn(taps.q() if which == "q" else taps.k()))
    for group in segments.groups(span, taps.tokens.device):
        value = signal.make(_of_group(taps, turned, group, guarded))
        assert value is not None
        value = value.movedim(axis, 1)
        if found is None:
            found = value.new_zeros(segments.total, *value.shape[2:])
        found = found.index_put((group.columns,), value)
    if found is None:
        return None
    if name in MEANS_OF_ROWS:
        share = _shares(segments, span, found.device)
        found = found * share.reshape(-1, *[1] * (found.dim() - 1)).to(found.dtype)
    return found[None].movedim(1, axis)


def _of_group(taps: TowerTaps, turned: Callable[[str], Tensor], group: Group, guarded: bool) -> TowerTaps:
    """Taps of some stretches as rows of their own, `[b, H, n, d]`; `turned` gives q and k of the whole row."""
    # Tokens do not know their order, so that a class token may as well stand in front.
    at = torch.cat([group.columns[:, -1:] + 1, group.columns], 1) if guarded else group.columns

    def heads(x: Tensor) -> Tensor:
        return x[0][:, at].transpose(0, 1)

    return _Turned(
        TowerRow(int(guarded), group.n),
        taps.tokens[:, :0],  # no signal with an entry for each token reads them
        lambda: heads(taps.q()),
        lambda: heads(taps.k()),
        taps.scale,
        None if taps.bias is None else taps.bias[0, 0, 0, at][:, None, None],
        classed=taps.classed,
        of=lambda which: heads(turned(which)),
    )


@dataclass
class _Turned(TowerTaps):
    """Taps that are told what q and k are behind rope.

    Attributes:
        of: gives ``"q"`` or ``"k"`` as the attention uses it.
    """

    of: Callable[[str], Tensor] = field(kw_only=True)

    def rotated(self) -> tuple[Tensor, Tensor]:
        return self.of("q"), self.of("k")

    def turned(self) -> Tensor:
        return self.of("k")


def _shares(segments: Segments, span: str, device: torch.device) -> Tensor:
    """Rows that see a token over rows of its frame, fp32 `[S]`."""
    frames, starts = segments.frame_lengths(), segments.starts
    share = torch.zeros(segments.total)
    for run in segments.runs(span):
        seen = sum(segments.items[i].n for i in run)
        for i in run:
            share[starts[i] : starts[i] + segments.items[i].n] = seen / frames[i]
    return share.to(device)
