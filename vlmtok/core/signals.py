"""Signals: what methods decide on, derived once from what adapters tap.

An adapter taps q, k, the scale, the bias and the rope of a block, and the whole row of tokens. Everything a method can
ask for follows from that here, so a new signal is one function. Shapes: B rows, N view tokens, P protected tokens, L
the whole row, T text rows, H heads, d head width, C channels.

| name | shape | meaning |
|---|---|---|
| keys, keys_full | B, N, d / B, N, H d | mean over heads, all heads; before rope |
| turned_keys, turned_keys_full | B, N, d / B, N, H d | the same after rope; equal where there is none |
| protected | B, P, C | protected tokens: first the one the head reads, inserted ones last |
| protected_queries, protected_keys | B, P, H d | their projections |
| inserted | B, E, C | outputs of the tokens this method inserted at its previous insert |
| protected_attention | B, P, H, N | their attention rows |
| cls_attention | B, H, N | row 0 of it |
| received_attention | B, N | mean over heads and rows of the attention a token receives |
| flat_attention | B, N | one head over the full width: the class token's row, or the mean over rows without one |
| outputs | B, N, C | what a block gave, for other sites: ``outputs@vision:feature`` are the tower's features |
| text | B, T, C | input embeddings of the text behind the view's first token |
| text_attention | B, H, T, N | attention rows of that text |
| last_attention | B, H, N | attention row of the prompt's last token |
| attention_to_text | B, N | attention mass of a visual row on that text, mean over heads |
| transition | B, 2, 2, L | (attention, MLP) x (norm ratio, cosine) of the modules' input and output |
| attention_logits | B, H, L, L | scaled and masked logits; dense |
| key_norm, text_key_norm | B, N / B, T | L1 norm, over key-value heads and channels, of keys after rope; of that text |
| normed, text_normed | B, N, C / B, T, C | what a layer gave, through the model's last norm; of that text |
| activation_match | B, N, T + 1 | neurons of an MLP that a token has on, and a row of that text, or the prompt's last |
| attention_mass | B, Hkv, N | sum of the attention that an entry of a cache received, over all rows of the prompt |
| text_mass | B, Hkv, N | the same over rows of text behind the row's first picture |
| recent_mass | B, Hkv, N | the same over the last ``site.window`` rows of the prompt |
| attention_rows | B, Hkv, N | rows of the prompt that stand at or behind the entry, its own included |
| keys_cached, values_cached | B, Hkv, N, d | entries as the cache holds them, keys after rope |

A neuron is on where the input of the MLP's last projection is positive. Attention is softmax over all keys that the
layer sees, then cut to the view's columns, not renormalised; at ``projected`` it is that of decoder layer 0. Rows that
the host hides as padding count in no mean, and get none. Those of caches are averaged over the heads that share keys;
in a view of scope ``head`` they are B, N and B, N, d.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import kernels
from ..errors import MissingSignal, SiteError
from .cache_signals import CACHE_SIGNALS, ENTRIES, MASSES
from .decoder_signals import AHEAD, BY_ATTENTION, DECODER_SIGNALS, END_ONLY, NEURONS, DecoderTaps
from .site import LAYERED, STAGES, Layout, Site, layer_of

if TYPE_CHECKING:
    from .reduction import Reduction
    from .sequence import TowerRow

__all__ = [
    "AHEAD",
    "BY_ATTENTION",
    "CACHE_SIGNALS",
    "DECODER_SIGNALS",
    "END_ONLY",
    "ENTRIES",
    "MASSES",
    "NEURONS",
    "OF_OUTPUT",
    "PER_TOKEN",
    "TOWER_SIGNALS",
    "DecoderTaps",
    "Need",
    "TowerSignal",
    "TowerTaps",
    "check_stage",
    "resolve_need",
    "tower_signal",
    "tower_signals",
]


@dataclass(frozen=True)
class Need:
    """One entry of `Site.needs`, resolved.

    Attributes:
        key: as the method wrote it; the name under which the view holds it.
        name: the signal.
        stage: where it is tapped; None means at the site itself.
        layer: the layer there.
    """

    key: str
    name: str
    stage: str | None = None
    layer: int | None = None


_NEED = re.compile(r"(?P<name>\w+)(@(?P<stage>\w+):(?P<layer>-?\d+|feature))?$")


def resolve_need(text: str, site: Site, layout: Layout, user: frozenset[str], by: str) -> Need:
    """Checks that a need can be met at a site, before any hook is placed.

    Args:
        text: ``"name"`` or ``"name@stage:layer"``.
        site: who needs it.
        layout: what the model offers.
        user: names of the signals that the user gives.
        by: the method, for the error.

    Returns:
        The need with its layer as a 0-based number.

    Raises:
        MissingSignal: the model cannot give it, or not at that moment.
    """
    found = _NEED.match(text)
    if found is None:
        raise MissingSignal(f"{by}: {text!r} is no signal; write name or name@stage:layer")
    name, stage = found["name"], found["stage"]
    if text in user:
        return Need(text, text)
    if stage is None and name == "outputs":
        raise MissingSignal(
            f"{by} needs {name!r} at {site} itself, which is view.tokens; name a place: {name}@stage:layer"
        )
    if stage is None:
        if site.stage == "features" and name == "protected" and layout.gives("vision", name):
            return Need(text, name, "vision", layout.stages["vision"].last)
        if not layout.gives(site.stage, name):
            offered = (layout.stages[site.stage].provides - {"outputs"}) | user
            raise MissingSignal(
                f"{by} needs the signal {name!r} at {site}, which {layout.family} cannot give"
                f"{_why(layout, site.stage)}; it gives there: {', '.join(sorted(offered)) or 'none'}"
            )
        _check_layer(name, site, layout, by)
        return Need(text, name)
    if not layout.gives(stage, name, later=stage != site.stage):
        offered = layout.stages[stage].provides if stage in layout.stages else frozenset()
        known = sorted(signal for signal in offered if layout.gives(stage, signal, later=stage != site.stage))
        raise MissingSignal(
            f"{by} needs {text!r}, which {layout.family} cannot give{_why(layout, stage)}; "
            f"{f'{stage} gives: ' + ', '.join(known) if known else f'nothing of {stage!r} reaches {site.stage}'}"
        )
    depth, last = layout.stages[stage].depth, layout.stages[stage].last
    layer = last if found["layer"] == "feature" else int(found["layer"])
    if not -depth <= layer < depth:
        raise MissingSignal(f"{by} needs {text!r}, but {stage} of {layout.family} has {depth} layers")
    layer %= depth
    same = site.stage == stage and site.layer is not None
    if STAGES.index(stage) > STAGES.index(site.stage) or (same and (layer > (site.layer or 0))):
        raise MissingSignal(f"{by} needs {text!r} at {site}, where that layer has not run yet")
    if stage in ("decoder", "cache"):
        raise MissingSignal(f"{by} needs {text!r} at {site}, but a decoder layer shows it at that layer only")
    return Need(text, name, stage, layer)


def _check_layer(name: str, site: Site, layout: Layout, by: str) -> None:
    """Checks that the layer of a site gives a signal which others of its stage give.

    Raises:
        MissingSignal: it does not, or only at its other end.
    """
    if site.stage == "decoder" and site.point != "end" and name in END_ONLY:
        raise MissingSignal(
            f"{by} needs the signal {name!r} at {site}, but it tells of what the layer did: name the end of a layer"
        )
    stage = layout.stages[site.stage]
    lacks = stage.lacks.get(name, {})
    why = "" if site.layer is None else lacks.get(site.layer, "")
    if why:
        layers = [i for i in range(stage.depth) if i not in lacks and (site.stage != "cache" or i not in stage.blind)]
        there = f"layers {', '.join(map(str, layers))} give it" if layers else "no layer gives it"
        raise MissingSignal(
            f"{by} needs the signal {name!r} at {site}, which {layout.family} cannot give ({why}); {there}"
        )


def _why(layout: Layout, stage: str) -> str:
    """The reason that a stage gives for what it lacks, in brackets."""
    why = layout.stages[stage].why if layout.has(stage) else ""
    return f" ({why})" if why else ""


# ---------------------------------------------------------------------- towers
@dataclass
class TowerTaps:
    """What was tapped of one tower block.

    Attributes:
        row: how the row that the block saw splits into view, protected and inserted tokens.
        tokens: `[B, L, C]`, the whole row at the site.
        q: gives q, `[B, H, L, d]`, before rope.
        k: gives k, `[B, H, L, d]`, before rope.
        scale: factor of the logits.
        bias: what the block adds to the logits, or None.
        rotate: applies the block's rope to `[B, H, L, d]`, or None.
        inserted: outputs of the method's previous insert, or None.
        left: how the row at the site splits, or None while it is the row that the block saw.
        cuts: what was taken of the block's row since.
        visible: bool `[B, L]`, tokens that the host shows to others, or None where none is padding.
        classed: whether the first protected token is a class token.
    """

    row: TowerRow
    tokens: Tensor
    q: Callable[[], Tensor]
    k: Callable[[], Tensor]
    scale: float
    bias: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    inserted: Tensor | None = None
    left: TowerRow | None = None
    cuts: tuple[Reduction, ...] = ()
    visible: Tensor | None = None
    classed: bool = True

    def rotated(self) -> tuple[Tensor, Tensor]:
        """q and k as the attention uses them."""
        q, k = self.q(), self.k()
        return (q, k) if self.rotate is None else (self.rotate(q), self.rotate(k))

    def turned(self) -> Tensor:
        """k as the attention uses it."""
        k = self.k()
        return k if self.rotate is None else self.rotate(k)

    def seen(self) -> Tensor | None:
        """The bias with -inf on keys that the host hides."""
        if self.visible is None:
            return self.bias
        start = self.tokens.new_zeros(()) if self.bias is None else self.bias
        return start.masked_fill(~self.visible[:, None, None], float("-inf"))

    def column_mean(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Mean over heads and rows of what each token receives, fp32 `[B, L]`; padding neither gives nor gets."""
        if self.visible is None:
            return kernels.received_attention(q, k, scale=scale, bias=self.bias)
        # Rows of padding look at padding alone, so that what they give is easily taken off.
        apart = self.visible[:, None, :, None] != self.visible[:, None, None, :]
        start = self.tokens.new_zeros(()) if self.bias is None else self.bias
        sums = kernels.received_attention(q, k, scale=scale, bias=start.masked_fill(apart, float("-inf")))
        rows = self.visible.sum(1, keepdim=True).clamp(min=1)
        return torch.where(self.visible, sums * (q.shape[2] / rows), 0.0)


def _flat(heads: Tensor) -> Tensor:
    """`[B, H, N, d]` to `[B, N, H d]`."""
    return heads.transpose(1, 2).flatten(2)


def _guard_rows(taps: TowerTaps, q: Tensor, k: Tensor, scale: float, rows: int) -> Tensor:
    """Attention of the first protected rows on the view's tokens, `[B, H, P, N]`."""
    bias = taps.seen()
    if bias is not None and bias.shape[-2] > 1:
        bias = taps.row.guard(bias, -2)[..., :rows, :]
    attention = kernels.attention_rows(taps.row.guard(q, 2)[:, :, :rows], k, scale=scale, bias=bias)
    return taps.row.inner(attention, 3)


def _protected_attention(taps: TowerTaps, rows: int | None = None) -> Tensor | None:
    rows = taps.row.guarded if rows is None else rows
    return _guard_rows(taps, *taps.rotated(), taps.scale, rows).transpose(1, 2) if taps.row.guarded else None


def _cls_attention(taps: TowerTaps) -> Tensor | None:
    rows = _protected_attention(taps, 1)
    return None if rows is None else rows[:, 0]


def _received(taps: TowerTaps) -> Tensor:
    q, k = taps.rotated()
    return taps.row.inner(taps.column_mean(q, k, taps.scale), 1)


def _flat_attention(taps: TowerTaps) -> Tensor:
    q, k = (_flat(heads).unsqueeze(1) for heads in taps.rotated())
    scale = q.shape[-1] ** -0.5
    if taps.classed and taps.row.guarded:
        return _guard_rows(taps, q, k, scale, 1)[:, 0, 0]
    return taps.row.inner(taps.column_mean(q, k, scale), 1)


@dataclass(frozen=True)
class TowerSignal:
    """A signal of towers.

    Attributes:
        make: derives it from the taps.
        axis: the axis of the view's tokens, gathered when it passes a reduction; None where there is none.
        projections: which of q and k are needed.
        guarded: whether the tower must have a protected token.
    """

    make: Callable[[TowerTaps], Tensor | None]
    axis: int | None = None
    projections: str = ""
    guarded: bool = False


TOWER_SIGNALS: dict[str, TowerSignal] = {
    "keys": TowerSignal(lambda taps: taps.row.inner(taps.k(), 2).mean(1), 1, "k"),
    "keys_full": TowerSignal(lambda taps: _flat(taps.row.inner(taps.k(), 2)), 1, "k"),
    "turned_keys": TowerSignal(lambda taps: taps.row.inner(taps.turned(), 2).mean(1), 1, "k"),
    "turned_keys_full": TowerSignal(lambda taps: _flat(taps.row.inner(taps.turned(), 2)), 1, "k"),
    "protected": TowerSignal(lambda taps: (taps.left or taps.row).guard(taps.tokens, 1)),
    "protected_queries": TowerSignal(lambda taps: _flat(taps.row.guard(taps.q(), 2)), None, "q"),
    "protected_keys": TowerSignal(lambda taps: _flat(taps.row.guard(taps.k(), 2)), None, "k"),
    "inserted": TowerSignal(lambda taps: taps.inserted),
    "protected_attention": TowerSignal(_protected_attention, 3, "qk"),
    "cls_attention": TowerSignal(_cls_attention, 2, "qk", guarded=True),
    "received_attention": TowerSignal(_received, 1, "qk"),
    "flat_attention": TowerSignal(_flat_attention, 1, "qk"),
    "outputs": TowerSignal(lambda taps: taps.row.inner(taps.tokens, 1), 1),
}

OF_OUTPUT = frozenset({"protected", "inserted", "outputs"})
"""Signals that are parts of a block's output: they need nothing of what happened inside."""

PER_TOKEN = frozenset(name for name, signal in TOWER_SIGNALS.items() if signal.axis is not None)
"""Tower signals with one entry for each token, which can go where the token goes."""


def tower_signal(name: str, taps: TowerTaps) -> Tensor | None:
    """A signal of the tokens that are left at the site; it comes from all that the block saw."""
    signal, value = TOWER_SIGNALS[name], TOWER_SIGNALS[name].make(taps)
    if value is not None and signal.axis is not None:
        for reduction in taps.cuts:
            value = reduction.gather(value, signal.axis)
    return value


def tower_signals(num_prefix: int, attention: bool = True) -> frozenset[str]:
    """Signals that a tower gives.

    Args:
        num_prefix: its protected tokens.
        attention: whether q and k of its blocks are known.
    """
    given = {name: signal for name, signal in TOWER_SIGNALS.items() if attention or not signal.projections}
    return frozenset(name for name, signal in given.items() if num_prefix or not signal.guarded)


def check_stage(site: Site, layout: Layout, by: str) -> None:
    """Checks that a model has the place a site names.

    Raises:
        SiteError: it has not; the message says what is possible.
    """
    stage = layout.stage(site.stage, by)
    if site.positions == "renumber" and not stage.renumbers:
        raise SiteError(
            f"{by}: positions='renumber' at {site} is not possible; position ids of {layout.family} are places in a "
            "picture, in three dimensions (M-RoPE), and no row of numbers: leave positions at None, or 'keep' them"
        )
    if site.stage not in LAYERED:
        return
    layer = site.layer if site.layer is not None else -1
    if not 0 <= layer < stage.depth:
        raise SiteError(f"{by}: {site} does not exist; {layout.family} has layers 0 to {stage.depth - 1} there")
    if site.point not in stage.points:
        raise SiteError(f"{by}: {site} is not possible; {layout.family} offers {', '.join(sorted(stage.points))}")
    if site.stage == "cache" and layer in stage.blind:
        raise SiteError(f"{by}: {site} has no entries that can leave: {stage.blind[layer]}")
    if site.stage == "decoder":
        if layer == 0 and site.point == "start":
            raise SiteError(
                f"{by}: decoder layer 0 start is not possible (hosts read the length of cache layer 0); "
                "use the stage 'projected'"
            )
        if stage.last_cut is not None and layer_of(layer, site.point) > stage.last_cut:
            raise SiteError(
                f"{by}: {site} is not possible; later layers of {layout.family} reuse keys of earlier ones, so the "
                f"last place is decoder layer {stage.last_cut} start"
            )
        if layer == stage.depth - 1 and site.point == "end":
            raise SiteError(f"{by}: decoder layer {layer} end is not possible: no layer follows; use an earlier one")
