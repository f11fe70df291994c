"""What layers have in the place of attention: mixers that keep a state of one size, whatever they have seen.

Counted is what their definitions in torch multiply (transformers' own, where no fused kernel is installed), as torch's
counter counts it: the padding of convolutions and of chunks is in, recurrences over single tokens and triangular solves
are not, being no matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64
"""Tokens of a chunk in which the delta rule is computed; a row is padded to whole chunks."""


@dataclass(frozen=True)
class ShortConv:
    """A causal convolution of each channel over its last inputs.

    Attributes:
        channels: of it.
        kernel: inputs that an output sees; so many are kept.
        size: bytes of one number.
    """

    channels: int
    kernel: int
    size: int

    def macs(self, queries: int, keys: int) -> int:
        """MACs of one row; `keys` counts what was seen before too.

        The last inputs stand in front of what enters (zeros, where a row is shorter), and zeros on both sides.
        """
        inputs = queries + self.kernel if keys > queries else max(queries, self.kernel)
        return self.channels * self.kernel * (inputs + self.kernel - 1)

    def step(self, recorded: bool = False) -> int:
        """MACs of one decode step of one row: the last inputs and the new one give two outputs, of which one is used.

        Args:
            recorded: whether the cache keeps what it could drop, for drafts that are taken back; zeros stand on both
                sides then, as in a prompt.
        """
        return self.macs(1, 2) if recorded else 2 * self.channels * self.kernel

    @property
    def state(self) -> int:
        """Bytes that one row keeps."""
        return self.channels * self.kernel * self.size


@dataclass(frozen=True)
class GatedDelta:
    """A gated delta rule behind a convolution of its queries, keys and values.

    Attributes:
        conv: of q, k and v side by side.
        heads: of values; keys and queries are repeated to as many.
        key_width: channels of a key.
        value_width: channels of a value.
        size: bytes of one number of the state, which is kept in full precision.
    """

    conv: ShortConv
    heads: int
    key_width: int
    value_width: int
    size: int = 4

    def macs(self, queries: int, keys: int) -> int:
        """MACs of one row.

        In a chunk of c tokens: keys and queries with keys, the result with values (c x c each), and what is read from
        the state by keys and by queries, and written to it (c x d x d' each).
        """
        inside = CHUNK * (2 * self.key_width + self.value_width) + 3 * self.key_width * self.value_width
        chunks = -(-queries // CHUNK)
        return self.conv.macs(queries, keys) + self.heads * chunks * CHUNK * inside

    def step(self, recorded: bool = False) -> int:
        """MACs of one decode step of one row: the recurrence works element by element; see `ShortConv.step`."""
        return self.conv.step(recorded)

    @property
    def state(self) -> int:
        """Bytes that one row keeps."""
        return self.conv.state + self.heads * self.key_width * self.value_width * self.size


Mixer = ShortConv | GatedDelta
"""What a layer may have in the place of attention."""
