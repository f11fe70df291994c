"""What passes leave for a pool, and which pass a head that is called by itself belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Noted:
    """What a pass left for its pool.

    Attributes:
        size: fp32 `[B, L]` of its tokens, or None where all are 1.
        pooled: the weighted vector, or None where there is nothing to weight.
        plain: `[B, D]`, the vector that the host makes of the tokens, by which the pass is recognised.
        tokens: whether they still live; None in compiled code.
    """

    size: Tensor | None
    pooled: Tensor | None = None
    plain: Tensor | None = None
    tokens: Callable[[], Tensor | None] | None = None

    @property
    def lives(self) -> bool:
        """Whether somebody can still hand its tokens to the head."""
        return self.tokens is not None and self.tokens() is not None


@dataclass
class PoolState:
    """A thread's passes on their way to one pool.

    Attributes:
        inside: whether the whole model's forward runs.
        ready: what the pass that runs left.
        known: passes that ran by themselves: the last one, and those whose tokens the caller still holds.
    """

    inside: bool = False
    ready: Noted | None = None
    known: list[Noted] = field(default_factory=list)


def nearest(vector: Tensor, known: list[Noted]) -> Noted | None:
    """The pass with this plain vector up to rounding, or None.

    Args:
        vector: `[B, D]`.
        known: passes with a plain vector of the same shape.
    """
    wide = [noted.plain.to(vector.device, torch.float64) for noted in known if noted.plain is not None]
    if not wide:
        return None
    gaps = torch.stack([(plain - vector.double()).abs().amax() for plain in wide])
    gap, at = gaps.min(0)
    noted = known[int(at)]
    assert noted.plain is not None
    bound = 8 * max(torch.finfo(vector.dtype).eps, torch.finfo(noted.plain.dtype).eps) * vector.double().abs().amax()
    return noted if bool(gap <= bound) else None
