"""Signals of decoder layers, derived from what an adapter taps of them; the table of all is that of `signals`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import kernels


@dataclass
class DecoderTaps:
    """What was tapped of one decoder layer, for one group of view rows.

    Rows are counted without padding, as they are now: a row has length L. The layer may have seen more keys (S): what
    the cache held before, padding, and tokens that another method dropped at the same site.

    Attributes:
        q: gives the queries of some rows: int64 `[B, R]` to `[B, H, R, d]`, after rope.
        k: gives the keys, `[B, Hkv, S, d]`, after rope.
        scale: factor of the logits.
        bias: gives what is added to the logits of those rows, `[B, 1, R, S]`: -inf where the layer does not look.
        here: int64 `[B, L]`, key of each token of the row.
        visual: int64 `[B, N]`, places of the view's tokens in the row.
        text: int64 `[B, T]`, places of the text behind the view's first token; T may be 0.
        mixed: whether some of that text stands before some of the view's tokens (else none of them can see it).
        transition: fp32 `[B, 2, 2, L]`, or None.
        cap: soft cap of the logits, or None.
        normed: gives what the layer gave to some rows, through the model's last norm: int64 `[B, R]` to `[B, R, C]`.
        active: gives which inputs of the MLP's last projection were positive there, bool `[B, R, F]`, or None where
            nobody asked before the layer ran.
        told: gives what `bias` is made of: the layer's mask `[B or 1, 1, ., S]`, or None where it is causal, and which
            keys are no padding then, bool `[B, S]`, or None where all are.
    """

    q: Callable[[Tensor], Tensor]
    k: Callable[[], Tensor]
    scale: float
    bias: Callable[[Tensor], Tensor]
    here: Tensor
    visual: Tensor
    text: Tensor
    mixed: bool = True
    transition: Tensor | None = None
    cap: float | None = None
    normed: Callable[[Tensor], Tensor] | None = None
    active: Callable[[Tensor], Tensor] | None = None
    told: Callable[[], tuple[Tensor | None, Tensor | None]] | None = None
    _key_norms: Tensor | None = field(default=None, init=False)

    def key_norms(self, columns: Tensor) -> Tensor:
        """L1 norms of the keys of some tokens of the row, over key-value heads and channels, fp32 `[B, M]`."""
        if self._key_norms is None:
            self._key_norms = self.k().abs().sum((1, 3), dtype=torch.float32)
        return self._key_norms.gather(1, self.here.gather(1, columns))

    def attend(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Attention of some rows on some tokens of the row, fp32 `[B, H, R, M]`."""
        bias = self.bias(rows)
        attention = kernels.attention_rows(self.q(rows), self.k(), scale=self.scale, bias=bias, cap=self.cap)
        keys = self.here.gather(1, columns)[:, None, None, :]
        return attention.gather(3, keys.expand(-1, attention.shape[1], attention.shape[2], -1))


def _text_attention(taps: DecoderTaps) -> Tensor | None:
    if taps.text.shape[1] == 0:
        return None
    return taps.attend(taps.text, taps.visual)


def _last(taps: DecoderTaps) -> Tensor:
    """The place of the prompt's last token, int64 `[B, 1]`."""
    batch, length = taps.here.shape
    return torch.full((batch, 1), length - 1, dtype=torch.int64, device=taps.here.device)


def _last_attention(taps: DecoderTaps) -> Tensor:
    return taps.attend(_last(taps), taps.visual)[:, :, 0]


def _attention_to_text(taps: DecoderTaps) -> Tensor:
    batch, n = taps.visual.shape
    if taps.text.shape[1] == 0 or not taps.mixed:
        return torch.zeros(batch, n, dtype=torch.float32, device=taps.visual.device)
    chunks = [taps.attend(rows, taps.text).sum(-1).mean(1) for rows in taps.visual.split(256, 1)]
    return torch.cat(chunks, 1)


def _attention_logits(taps: DecoderTaps) -> Tensor:
    batch, length = taps.here.shape
    rows = torch.arange(length, device=taps.here.device).expand(batch, length)
    q, k = taps.q(rows).float(), taps.k().float()
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q * taps.scale) @ k.transpose(-1, -2)
    if taps.cap is not None:
        logits = taps.cap * torch.tanh(logits / taps.cap)
    logits = logits + taps.bias(rows)
    keys = taps.here[:, None, None, :].expand(-1, logits.shape[1], length, -1)
    return logits.gather(3, keys)


def _normed(taps: DecoderTaps, places: Tensor) -> Tensor | None:
    return None if taps.normed is None else taps.normed(places)


def _activation_match(taps: DecoderTaps) -> Tensor | None:
    if taps.active is None:
        return None
    # Sums of ones are exact in fp32 up to 2 ** 24 neurons; in pieces, since ones take four bytes each.
    asked = taps.active(torch.cat([taps.text, _last(taps)], 1)).float().transpose(1, 2)
    return torch.cat([taps.active(rows).float() @ asked for rows in taps.visual.split(256, 1)], 1)


def _of_text(make: Callable[[DecoderTaps, Tensor], Tensor | None]) -> Callable[[DecoderTaps], Tensor | None]:
    """The same of the text; None where there is none."""
    return lambda taps: make(taps, taps.text) if taps.text.shape[1] else None


NEURONS = "activation_match"
"""The signal that is read off the inside of an MLP."""
DECODER_SIGNALS: dict[str, Callable[[DecoderTaps], Tensor | None]] = {
    "text_attention": _text_attention,
    "last_attention": _last_attention,
    "attention_to_text": _attention_to_text,
    "attention_logits": _attention_logits,
    "transition": lambda taps: taps.transition,
    "key_norm": lambda taps: taps.key_norms(taps.visual),
    "text_key_norm": _of_text(DecoderTaps.key_norms),
    "normed": lambda taps: _normed(taps, taps.visual),
    "text_normed": _of_text(_normed),
    NEURONS: _activation_match,
}
END_ONLY = frozenset({"transition", NEURONS})
"""Signals that exist only at the end of a layer: they look at what it did."""
BY_ATTENTION = frozenset(DECODER_SIGNALS) - END_ONLY - {"normed", "text_normed"}
"""Signals that are derived from queries or keys, which not every layer has."""
AHEAD = frozenset({"text_attention", "last_attention"})
"""Signals of decoder layer 0 that are shown in front of it, at ``projected``: computed ahead with its norm, q and k."""
