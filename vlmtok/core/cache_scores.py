"""Methods that choose entries of key-value caches by a score: where they act, and how attention is read there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .aliases import Alias, share_that_goes
from .method import Method
from .reduction import Reduction
from .selection import keep_top
from .settings import check_choice, check_keep, check_layer, check_range, keep_count
from .site import BUDGET_SCOPES, Counts, Layout, Site
from .view import TokenView

COMPRESSION_RATIO = share_that_goes("compression_ratio", "keep", "keep", "kvpress")
"""What kvpress calls the share that goes."""
CACHE_SCOPES = ("head", *BUDGET_SCOPES)
"""Scopes that a `keep` can be meant for at the cache, where a method lets the user say."""


def over_heads(signal: Tensor) -> Tensor:
    """A number an entry: the mean over key-value heads where a view row has all of them.

    Args:
        signal: `[B, Hkv, N]`, or `[B, N]` of view rows that are one head, any floating dtype.

    Returns:
        fp32 `[B, N]`.
    """
    signal = signal.float()
    return signal.mean(1) if signal.dim() == 3 else signal


def shares(mass: Tensor) -> Tensor:
    """Attention mass as a share of that of the whole view row.

    Args:
        mass: `[B, N]`, not negative, any floating dtype.

    Returns:
        fp32 `[B, N]`; zeros where a row has no mass. NaN stays, and counts nothing for the others.
    """
    mass = mass.float()
    return mass / mass.nan_to_num(0.0).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(eq=False)
class ScoredCache(Method):
    """What methods share that keep the entries of highest score in the caches of layers, layer by layer.

    Args:
        keep: share (float) or count (int) of a view row's entries that stay in each layer.
        layers: 0-based layers whose caches lose entries, one or several; negatives count from the end. None is all
            that can.
        every: decode steps after which the method is asked again, of what is left by then (a share is that of what is
            still held, a count stays one); 0 asks it behind the prompt alone. Refused with assistants.

    Attributes:
        needs: signals of the score.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[tuple[Alias, ...]] = (COMPRESSION_RATIO,)
    budget_parameter = "keep"

    keep: float | int = 0.5
    layers: int | tuple[int, ...] | None = None
    every: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        by = type(self).__name__
        check_keep(self.keep, by)
        for layer in self.layers if isinstance(self.layers, (tuple, list)) else [self.layers]:
            check_layer(layer, by, "layers")
        check_choice(self.scope, by, "scope", CACHE_SCOPES)
        check_range(self.every, by, "every", 0, kind=int)

    def sites(self, layout: Layout) -> list[Site]:
        """The caches of the layers."""
        found: Sequence[int] = layout.cached_layers(self.layers, type(self).__name__)
        how = {"needs": self.needs, "scope": self.scope, "every": self.every, **self.site_settings()}
        return [Site("cache", layer, **how) for layer in found]

    def site_settings(self) -> dict[str, Any]:
        """What sites say beyond that: none by default."""
        return {}

    def score(self, view: TokenView) -> Tensor:
        """How much each entry matters.

        Args:
            view: entries of one layer.

        Returns:
            `[B, N]`, higher stays.
        """
        raise NotImplementedError

    def reduce(self, view: TokenView) -> Reduction | None:
        """The entries of highest score, in their order."""
        n = view.counts.n
        k = keep_count(self.keep, n)
        return None if k == n else Reduction(keep_top(self.score(view), k))

    def count(self, counts: Counts) -> int | None:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
