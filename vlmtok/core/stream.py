"""What a key-value cache holds after cuts: which columns are real, how far positions moved, what comes next.

The state travels with the cache object as an attribute, so that copies and beams keep it. A segment is a run of layers
whose caches hold the same columns; a cut inside the language model starts a new one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError
from .pictures import Picture

ATTRIBUTE = "_vlmtok_stream"
_numbers = itertools.count()


def attachment_number() -> int:
    """A number for one attachment; a cache cut under another one is refused."""
    return next(_numbers)


@dataclass(eq=False)
class Segment:
    """Layers from `first` to the next segment.

    Attributes:
        first: first layer.
        length: columns that their caches hold.
        valid: bool `[B, length]`, or None while all are real.
        blocks: int64 `[B, length]`, which bidirectional block each column belongs to (-1 none), or None.
        shift: int64 `[B]`, how far its positions lie below the host's, or None while they are the host's.
        renumbered: whether its positions differ from those at the language model's input.
        bias: fp32 `[B, Hkv, length]`, what is added to logits of merged entries, or None.
    """

    first: int
    length: int = 0
    valid: Tensor | None = None
    blocks: Tensor | None = None
    shift: Tensor | None = None
    renumbered: bool = False
    bias: Tensor | None = None

    def extended(self, count: int, valid: Tensor | None, rows: int, device: torch.device) -> Tensor | None:
        """Validity of cached and new columns together, bool `[B, length + count]`, or None where all are real."""
        if self.valid is None and valid is None:
            return None
        old = self.valid if self.valid is not None else torch.ones(rows, self.length, dtype=torch.bool, device=device)
        new = valid if valid is not None else torch.ones(rows, count, dtype=torch.bool, device=device)
        return torch.cat([old, new], 1)

    def extended_blocks(self, count: int, blocks: Tensor | None, rows: int, device: torch.device) -> Tensor | None:
        """Block of cached and new columns together, int64 `[B, length + count]`, or None where there is none."""
        if self.blocks is None and blocks is None:
            return None
        none: dict[str, Any] = {"dtype": torch.int64, "device": device}
        old = self.blocks if self.blocks is not None else torch.full((rows, self.length), -1, **none)
        new = blocks if blocks is not None else torch.full((rows, count), -1, **none)
        return torch.cat([old, new], 1)

    def copy(self, first: int) -> Segment:
        """The same past for later layers."""
        return Segment(first, self.length, self.valid, self.blocks, self.shift, self.renumbered, self.bias)


@dataclass(eq=False)
class Stream:
    """The past of one cache.

    Attributes:
        owner: number of the attachment that cut it.
        rows: B.
        seen: original columns so far, dropped ones included.
        next: int64 `[B]`, one more than the largest position so far in the host's own count, and
        follows: one more than the last; hosts go on from either, and behind a clip they differ.
        croppable: columns behind the last picture, in the row that has fewest; they may be taken off again.
        segments: by first layer; 0 is always there.
        pictures: of which entries may leave while the answer is written; empty where none do so.
        written: columns that came since.
    """

    owner: int
    rows: int
    seen: int = 0
    next: Tensor | None = None
    follows: Tensor | None = None
    croppable: int = 0
    segments: dict[int, Segment] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    written: int = 0

    def segment(self, layer: int) -> Segment:
        """The segment that a layer belongs to."""
        return self.segments[max(first for first in self.segments if first <= layer)]

    def crop(self, count: int) -> None:
        """The host took the last columns off every layer (assisted decoding).

        Raises:
            CacheError: more than what stands behind the last picture.
        """
        if count > self.croppable:
            raise CacheError(
                f"the cache was cropped by {count} columns, of which only the last {self.croppable} stand behind a "
                "picture; layers hold different columns of a cut picture, and the same number cannot be taken off all"
            )
        self.croppable -= count
        for segment in self.segments.values():
            segment.length -= count
            if segment.valid is not None:
                segment.valid = segment.valid[:, : segment.length]
            if segment.blocks is not None:
                segment.blocks = segment.blocks[:, : segment.length]
            if segment.bias is not None:
                segment.bias = segment.bias[..., : segment.length]
        self.seen -= count
        if self.next is not None and self.follows is not None:
            self.next, self.follows = self.next - count, self.follows - count


def read_stream(cache: Any, owner: int, rows: int, held: int, layer: int = 0) -> Stream | None:
    """The stream filed with a cache, brought up to what the cache holds now.

    Args:
        cache: a cache object, or None.
        owner: number of the attachment that asks.
        rows: rows of this call.
        held: columns that the cache says it holds, and
        layer: the layer that it reads them from.

    Returns:
        The stream; None where nothing was cut in this cache.

    Raises:
        CacheError: the cache was cut by another compression, or changed behind our back.
    """
    stream: Stream | None = getattr(cache, ATTRIBUTE, None) if cache is not None else None
    if stream is None:
        return None
    if held == 0:  # reset, or taken for a new conversation
        delattr(cache, ATTRIBUTE)
        return None
    if stream.owner != owner:
        raise CacheError("this cache was filled under another compression (or a removed one); start with a fresh cache")
    if stream.rows != rows:
        raise CacheError(
            f"this cache was filled with {stream.rows} rows, and the call has {rows}; start with a fresh one"
        )
    have = stream.segment(layer).length
    if held > have:
        raise CacheError(
            f"the cache holds {held} columns where this compression filed {have}: it was used while the compression "
            "was paused or removed; start with a fresh cache"
        )
    if held < have:
        stream.crop(have - held)
    return stream


def file_stream(cache: Any, stream: Stream) -> None:
    """Files a stream with its cache."""
    setattr(cache, ATTRIBUTE, stream)
