"""HiPrune: anchors by a middle tower layer with their neighbours, and registers by the last one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top, ranked
from ..core.settings import check_choice, check_keep, check_layer, check_range, keep_count
from ..core.site import SEPARATORS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError

EDGES = ("wrap", "drop")
"""What is a neighbour of a cell at the grid's edge: the cell that lies one place or one row on, or a corner, as
released; or none."""


def anchors_of(k: int, alpha: float) -> int:
    """Anchors among k tokens: ``round(k alpha / 5)``, half to even; with their neighbours at most k."""
    return min(round(k * alpha / 5), k // 5)


def marked_cells(anchors: Tensor, grid: tuple[int, int], edges: str) -> Tensor:
    """Anchors and their four neighbours.

    Args:
        anchors: int64 `[B, A]`, cells in raster order.
        grid: rows and columns.
        edges: as in `EDGES`.

    Returns:
        bool `[B, N]`.
    """
    rows, columns = grid
    n = rows * columns
    steps = torch.tensor([0, -1, 1, -columns, columns], device=anchors.device)
    cells = anchors.unsqueeze(-1) + steps
    if edges == "wrap":
        cells = cells.clamp(0, n - 1)
    else:
        column = anchors.unsqueeze(-1) % columns
        outside = (cells < 0) | (cells >= n)
        way = torch.arange(5, device=anchors.device)  # itself, left, right, above, below
        outside |= (way == 1) & (column == 0) | (way == 2) & (column == columns - 1)
        cells = torch.where(outside, anchors.unsqueeze(-1), cells)
    marked = torch.zeros(anchors.shape[0], n, dtype=torch.bool, device=anchors.device)
    return marked.scatter(1, cells.flatten(1), True)


def anchors_and_registers(
    anchor_score: Tensor, register_score: Tensor, grid: tuple[int, int], k: int, alpha: float, edges: str = "wrap"
) -> tuple[Tensor, Tensor]:
    """The tokens that stay (arXiv 2508.00553).

    Args:
        anchor_score: `[B, N]`, attention received in a middle layer.
        register_score: `[B, N]`, attention received in the last one.
        grid: rows and columns.
        k: how many, at most N.
        alpha: share of them that are anchors with their neighbours.
        edges: as in `EDGES`.

    Returns:
        int64 `[B, k]` ascending, and bool `[B, N]`, which are anchors or neighbours.
    """
    bad = anchor_score.isnan() | register_score.isnan()
    anchors = ranked(torch.where(bad, float("-inf"), anchor_score.float()))[:, : anchors_of(k, alpha)]
    marked = marked_cells(anchors, grid, edges) & ~bad
    registers = torch.where(bad, float("-inf"), register_score.float())
    return keep_top(torch.where(marked, float("inf"), registers), k), marked


def _middle_layer(layout: Layout) -> int:
    """The default object layer."""
    tower = layout.stages["vision"]
    first = -(-3 * tower.depth // 8) - 1
    return next((layer for layer in range(first, tower.last + 1) if layer not in tower.windowed), first)


@register_method
@dataclass(eq=False)
class HiPrune(Method):
    """Keeps the tokens that a middle tower layer looks at, with their neighbours, and those that the last one looks at.

    Scores are the attention that a token receives from all others, in two layers; the text plays no part. It acts
    before the projector, crop by crop; where nothing can leave there, at the language model's input on the same scores,
    as the release does for Qwen2.5-VL.

    Algorithm:
        1. ``u``, ``v``: received attention of the object layer and of the layer that the projector reads, mean over
           heads and all rows.
        2. The ``round(k alpha / 5)`` tokens of highest u are anchors; their neighbours left, right, above and below
           join them.
        3. The tokens of highest v fill up to k.
        4. All that stay keep the order of the picture.

    Args:
        keep: share (float) or count (int) of a crop's tokens that stay.
        alpha: share of these that are anchors with their neighbours.
        object_layer: 0-based tower layer of the anchors, negative from the end; None is the first from
            ceil(3/8 depth) - 1 on that sees the whole picture: the release's 8 of CLIP's 24 and 15 of Qwen2.5-VL's 32.
        edges: neighbours at the grid's edge: ``"wrap"``, as released (the next row's first cell, or a corner of the
            picture), or ``"drop"``, none.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"``, so
            that `keep` counts all tokens, as released, or ``"keep"``.
    """

    paper = (
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models (ACL 2026)"
    )
    arxiv = "2508.00553"
    code = "https://github.com/Danielement321/HiPrune"
    parity = "index-exact with the released selection (hiprune_*)"
    deviations = (
        "Anchors and neighbours are never taken twice, so that k tokens stay; the release's Qwen2.5-VL keeps fewer.",
        "Each crop has its own share; the release divides one budget by all crops of a call.",
        "As many anchors as fit with their neighbours; the release fails for alpha near 1.",
        "The default object layer of a tower that the release does not know is at the same share of its depth.",
        "Attention of flash kernels is that of the picture; the release's own mixes all pictures of a call.",
        "HiPrune++ of the paper's later version (text similarity) has no public code and is not here.",
    )
    caveats = (
        "Fine print goes: with a quarter of scenes-llava's tokens 10 of 25 such questions are right, with a tenth 1, "
        "where counting keeps 20 and 14 (300 questions of scenes-vqa).",
    )
    aliases = (
        Alias("retention", "keep", "the released code"),
        Alias("object_layer_idx", whose="the released code", instead="it counts layers from 1; object_layer from 0"),
    )
    budget_parameter = "keep"
    scope = "part"

    keep: float | int = 0.334
    alpha: float = 0.1
    object_layer: int | None = None
    edges: str = "wrap"
    separators: str = "drop"

    def __post_init__(self) -> None:
        check_keep(self.keep, "HiPrune")
        check_range(self.alpha, "HiPrune", "alpha", 0, 1)
        check_layer(self.object_layer, "HiPrune", "object_layer")
        check_choice(self.edges, "HiPrune", "edges", EDGES)
        check_choice(self.separators, "HiPrune", "separators", SEPARATORS)

    def sites(self, layout: Layout) -> list[Site]:
        """What the projector gets, or what it made where that reaches the language model with its attention."""
        stage = layout.feature_stage("HiPrune", ["received_attention"])
        layer = _middle_layer(layout) if self.object_layer is None else self.object_layer
        separators = self.separators if stage == "projected" else "keep"
        needs = (f"received_attention@vision:{layer}", "received_attention@vision:feature")
        return [Site(stage, needs=needs, separators=separators)]

    def remarks(self, layout: Layout) -> list[str]:
        """Which stage it took where that is not the papers'."""
        return layout.said_of_stage("HiPrune", layout.feature_stage("HiPrune", ["received_attention"]))

    def reduce(self, view: TokenView) -> Reduction | None:
        """Anchors, neighbours and registers, in the order of the tokens."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        if view.grid is None and anchors_of(k, self.alpha):
            raise ParameterError(
                f"HiPrune: neighbours are told by rows and columns, and {view.counts.n} tokens at {view.site} form no "
                "single grid; alpha=0.0 needs none"
            )
        last = view.signal("received_attention@vision:feature")
        if not anchors_of(k, self.alpha):
            return Reduction(keep_top(last, k))
        assert view.grid is not None
        middle = view.signal(view.site.needs[0])
        return Reduction(anchors_and_registers(middle, last, view.grid, k, self.alpha, self.edges)[0])

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
