"""The two methods of the self-test: one that looks everywhere and cuts nothing, one that keeps a fixed choice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...core.method import Method
from ...core.reduction import Reduction
from ...core.site import Counts, Layout, Site
from ...core.view import TokenView


def scattered(n: int) -> list[int]:
    """Which of `n` tokens stay: 0, 1 and 3 of every five, so that gaps and runs occur."""
    return [i for i in range(n) if i % 5 in (0, 1, 3)]


def some(n: int) -> torch.Tensor:
    """The same as int64 `[K]`."""
    return torch.tensor(scattered(n), dtype=torch.int64)


def middle(layout: Layout, stage: str) -> int:
    """The layer of a stage at which the self-test cuts: far from both ends, and where a cut is allowed."""
    found = layout.stages[stage]
    if stage == "cache":
        layers = layout.cached_layers(by="the self-test")
        return layers[len(layers) // 2]
    layer = (found.last + 1) // 2 if stage == "decoder" else found.last // 2
    return layer if found.last_cut is None else min(layer, found.last_cut)


def cut_sites(layout: Layout) -> dict[str, Site]:
    """Where the self-test cuts, by the fact that it proves."""
    sites: dict[str, Site] = {}
    # Where pictures share a row, its boundaries are the host's own business, which the replay knows nothing of.
    if layout.has("vision") and not layout.stages["vision"].untried:
        sites["tower"] = Site("vision", middle(layout, "vision"), "mid")
    if layout.has("projected"):
        sites["input"] = Site("projected", positions="keep")
    if layout.has("decoder"):
        sites["layer"] = Site("decoder", middle(layout, "decoder"), "start", positions="keep")
    if layout.has("text"):
        sites["text"] = Site("text", middle(layout, "text"), "mid")
    return sites


@dataclass(eq=False)
class Fixed(Method):
    """Keeps a fixed, scattered choice of tokens at one site."""

    site: Site = field(default_factory=lambda: Site("projected"))

    def sites(self, layout: Layout) -> list[Site]:
        """The one."""
        return [self.site]

    def reduce(self, view: TokenView) -> Reduction:
        """The same places in every row."""
        batch, n, _ = view.tokens.shape
        return Reduction(some(n).to(view.tokens.device).expand(batch, -1))

    def count(self, counts: Counts) -> int:
        """How many stay."""
        return len(scattered(counts.n))


@dataclass(eq=False)
class Nothing(Method):
    """Looks at every stage and cuts nothing.

    Attributes:
        asked: sites at which it was asked.
    """

    asked: set[str] = field(default_factory=set, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        """Every point of a middle layer of every stage."""
        found: list[Site] = []
        for stage, offered in layout.stages.items():
            if not layout.has(stage):
                continue
            if stage in ("features", "projected"):
                found.append(Site(stage))
            else:
                layer = middle(layout, stage)
                found += [Site(stage, layer, point) for point in ("start", "mid", "end") if point in offered.points]
        # The end of the layer before the last cut is the start of the last one.
        decoder = layout.stages.get("decoder")
        if decoder is not None and decoder.last_cut is not None:
            layer = middle(layout, "decoder")
            found = [s for s in found if s.stage != "decoder" or s.point == "start" or layer < decoder.last_cut]
        return found

    def reduce(self, view: TokenView) -> None:
        """Leaves the tokens as they are."""
        self.asked.add(str(view.site))
