"""Which blocks of a tower need which hooks: those that have something to do, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...core.attachment import Attachment
from ...core.signals import TOWER_SIGNALS
from ..base import TowerSpec


@dataclass(frozen=True)
class BlockPlan:
    """Hooks of one block, besides the one at its start.

    Attributes:
        layer: its number.
        attention: whether one stands in front of the attention.
        biased: whether sizes of tokens may count in its attention.
        projections: which of ``"q"`` and ``"k"`` are caught.
        mid: whether rows get shorter between attention and MLP.
        end: whether something happens behind the block.
    """

    layer: int
    attention: bool
    biased: bool
    projections: frozenset[str]
    mid: bool
    end: bool


def first_proportional(attachment: Attachment, stage: str, depth: int) -> int:
    """The first layer from which sizes of tokens may count in the attention; the number of layers where they never do.

    Args:
        attachment: whose methods.
        stage: of the tower.
        depth: its blocks.
    """
    layers = [entry.site.layer or 0 for entry in attachment.at(stage) if entry.method.proportional]
    return min(layers, default=depth)


def block_plans(attachment: Attachment, spec: TowerSpec, masks_follow: bool) -> Iterator[BlockPlan]:
    """The blocks that need hooks, in order; none where no method has to do with the tower.

    Args:
        attachment: whose methods.
        spec: the tower as data.
        masks_follow: whether every layer behind a cut needs a mask of its rows.
    """
    stage, block, depth = spec.stage, spec.block, len(spec.blocks)
    entries, tapped = attachment.at(stage), attachment.tapped(stage)
    if not entries and not tapped and not attachment.at("features"):
        return
    proportional_from = first_proportional(attachment, stage, depth)
    first_cut = min((entry.site.layer or 0 for entry in entries), default=depth)
    for layer in range(depth):
        here = {point: attachment.at(stage, layer, point) for point in ("start", "mid", "end")}
        own = any(here.values()) or layer in tapped
        biased = layer > proportional_from or (layer == proportional_from and bool(here["start"]))
        biased = biased and block.takes_bias
        rotated = bool(block.rope) and layer > first_cut
        masked = (spec.masked or masks_follow) and layer >= first_cut
        grid = spec.returns_grid and layer == spec.last % depth
        if not (layer == 0 or own or biased or rotated or masked or grid):
            continue
        needs = [n for point in ("mid", "end") for entry in here[point] for n in entry.needs if n.stage is None]
        needs += tapped.get(layer, [])
        projections = {which for n in needs if n.name in TOWER_SIGNALS for which in TOWER_SIGNALS[n.name].projections}
        attention = biased or own or masked
        yield BlockPlan(layer, attention, biased, frozenset(projections), bool(here["mid"]), own or grid)
