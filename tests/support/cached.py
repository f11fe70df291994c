"""Methods for key-value caches that stand in for any: they keep what received most attention, in every way there is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vlmtok import FastV, Method, Reduction, Site
from vlmtok.core.signals import ENTRIES


@dataclass(eq=False)
class Held(Method):
    """Keeps a share of the entries of each layer, by a mass, and multiplies something of its own.

    Attributes:
        keep: share that stays; of every second layer, as `odd` says.
        odd: share that stays of layers with odd numbers; None means `keep`.
        by: a mass; of entries it is their length.
        of: scope of its sites.
        window: of ``recent_mass``.
        layers: of which caches; None means all.
        ragged: whether rows mark fewer entries than they have slots.
        told: whether the count is known beforehand.
        every: decode steps after which it is asked again.
    """

    budget_parameter = "keep"

    keep: float = 0.5
    odd: float | None = None
    by: str = "attention_mass"
    of: str = "picture"
    window: int = 0
    layers: tuple[int, ...] | None = None
    ragged: bool = False
    told: bool = True
    every: int = 0

    def sites(self, layout):
        needs = (self.by, "values_cached")
        layers = layout.cached_layers(self.layers)
        return [
            Site("cache", layer, needs=needs, scope=self.of, window=self.window, every=self.every) for layer in layers
        ]

    def left(self, layer, n):
        share = self.keep if self.odd is None or layer % 2 == 0 else self.odd
        return round(share * n)

    def count(self, counts):
        return self.left(counts.layer, counts.n) if self.told and not self.ragged else None

    def at_level(self, level, layout, tokens):
        return replace(self, keep=level)

    def reduce(self, view):
        mass = view.signal(self.by)
        mass = mass.float().norm(dim=-1) if self.by in ENTRIES else mass
        score = mass if mass.dim() == 2 else mass.mean(1)
        own = view.tokens.float() @ view.tokens.float().transpose(1, 2)
        assert view.signal("values_cached").shape[-2] == own.shape[1]
        slots = self.left(view.layer, view.tokens.shape[1])
        keep = score.argsort(dim=1, descending=True, stable=True)[:, :slots]
        if not self.ragged:
            return Reduction(keep)
        valid = torch.arange(slots, device=keep.device) < slots - (score[:, :1] > score.mean()).long()
        return Reduction(keep, valid=valid)


@dataclass(eq=False)
class Planned(Held):
    """The same with one share for all layers together, which `plan` deals out."""

    def count(self, counts):
        return None

    def plan(self, views):
        means = torch.stack([view.signal(self.by).float().reshape(len(view.tokens), -1).mean(1) for view in views])
        for view, mean in zip(views, means):
            assert view.row is views[0].row
            view.row[f"layer {view.layer}"] = mean
        view.row["alike"] = means.T @ means

    def reduce(self, view):
        assert view.row["alike"].shape == (len(view.tokens),) * 2 and f"layer {view.layer}" in view.row
        return super().reduce(view)


class Forgetting(FastV):
    """FastV after which layers in front of its cut forget what it dropped, too."""

    def sites(self, layout):
        return [replace(site, forget=True) for site in super().sites(layout)]
