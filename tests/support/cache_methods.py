"""Methods of the cache stage whose choice is easily said: `Rule` as a method, and merges of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmtok import Counts, Layout, Method, Reduction, Site, TokenView

from .cache_choices import Rule

NEEDS = {
    "stride": (),
    "above": ("attention_mass",),
    "mean_mass": ("attention_mass", "attention_rows"),
    "key_sum": ("keys_cached",),
    "value_norm": ("values_cached",),
}


@dataclass(eq=False)
class Held(Method):
    """Keeps entries of caches by a `Rule`."""

    rule: Rule = field(default_factory=Rule)
    heads = 0

    def sites(self, layout: Layout) -> list[Site]:
        needs = NEEDS.get(self.rule.by, (self.rule.by,))
        layers = layout.cached_layers(self.rule.layers, "held")
        self.heads = layout.stages["cache"].heads
        more = {"scope": self.rule.scope, "window": self.rule.window, "every": self.rule.every}
        return [Site("cache", layer, needs=needs, **more) for layer in layers]

    def score(self, view: TokenView) -> Tensor:
        """`[B, N]`: of each head in scope ``head``, else the mean of heads."""
        if self.rule.by == "key_sum":
            found = view.signal("keys_cached").float().sum(-1)
        elif self.rule.by == "value_norm":
            found = view.signal("values_cached").float().norm(dim=-1)
        elif self.rule.by == "mean_mass":
            found = view.signal("attention_mass") / view.signal("attention_rows")
        else:
            found = view.signal(NEEDS.get(self.rule.by, (self.rule.by,))[0])
        return found if self.rule.scope == "head" else found.mean(1)

    def reduce(self, view: TokenView) -> Reduction | None:
        rows, n, _ = view.tokens.shape
        layer = view.site.layer
        if layer in self.rule.spared:
            return None
        if self.rule.by == "stride":
            each = self.heads if self.rule.scope == "head" else 1
            kept = [self.rule.places(n, layer, row % each) for row in range(rows)]
            return Reduction(torch.tensor(kept, dtype=torch.int64, device=view.tokens.device).reshape(rows, -1))
        score = self.score(view)
        order = score.argsort(dim=1, descending=True, stable=True)
        if self.rule.by == "above":
            return Reduction(order, valid=(score > score.mean(1, keepdim=True)).gather(1, order))
        return Reduction(order[:, : self.rule.count(n)])

    def count(self, counts: Counts) -> int | None:
        if self.rule.by == "above":
            return None
        return counts.n if counts.site.layer in self.rule.spared else self.rule.count(counts.n)


@dataclass(eq=False)
class Pairs(Method):
    """Every second entry of a cache joins the one before it.

    Args:
        scope_of: what one view row is.
        keys: what becomes of keys.
        proportional: whether merged entries weigh log(size) more.
        weights: (of the kept, of the joined) instead of the mean.
        layers: where.
    """

    scope_of: str = "picture"
    keys: str = "kept"
    proportional: bool = False
    weights: tuple[float, float] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.merge_keys = self.keys

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("cache", layer, scope=self.scope_of) for layer in layout.cached_layers(self.layers, "pairs")]

    def reduce(self, view: TokenView) -> Reduction:
        rows, n, _ = view.tokens.shape
        even, odd = torch.arange(0, n, 2).expand(rows, -1), torch.arange(1, n, 2).expand(rows, -1)
        given: dict[str, Any] = {}
        if self.weights is not None:
            whole = torch.ones(even.shape)
            whole[:, : odd.shape[1]] = self.weights[0]
            given = {"keep_weight": whole, "src_weight": torch.full(odd.shape, self.weights[1])}
        return Reduction(even, odd, odd // 2, **given)

    def count(self, counts: Counts) -> int:
        return (counts.n + 1) // 2


@dataclass(eq=False)
class Planned(Method):
    """Half of the entries stay, from a place on that is the layer's rank by mass on the first entry of the view."""

    def sites(self, layout: Layout) -> list[Site]:
        needs = ("attention_mass",)
        return [Site("cache", layer, needs=needs, scope="head") for layer in layout.cached_layers(None, "planned")]

    def plan(self, views: Sequence[TokenView]) -> None:
        layers = [view.site.layer for view in views]
        assert layers == sorted(layers)
        assert all(view.tokens.device.type == "meta" and view.row is views[0].row for view in views)
        first = torch.stack([view.signal("attention_mass")[:, 0] for view in views], 1)  # [rows, layers]
        order = first.argsort(dim=1, descending=True, stable=True)
        views[0].row["rank"] = order.argsort(dim=1)
        views[0].row["layers"] = torch.tensor(layers).expand(len(first), -1)

    def reduce(self, view: TokenView) -> Reduction:
        rows, n, _ = view.tokens.shape
        at = (view.row["layers"] == view.site.layer).int().argmax(1, keepdim=True)
        start = view.row["rank"].gather(1, at)
        return Reduction(((torch.arange(n // 2) + start) % n).sort(dim=1).values)

    def count(self, counts: Counts) -> int:
        return counts.n // 2
