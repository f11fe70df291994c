"""Methods that choose by a tower's attention where its projector reads: where they act, and what they are shown."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .method import Method
from .site import Layout, Site
from .view import TokenView


def tower_attention(view: TokenView) -> Tensor:
    """fp32 `[B, N]`: the class token's attention, mean over heads, or what each token receives."""
    name = "cls_attention@vision:feature"
    return view.signal(name).float().mean(1) if view.has(name) else view.signal("received_attention@vision:feature")


class ScoredByTower(Method):
    """What methods share that choose by the attention of the layer that the projector reads, crop by crop.

    Attributes:
        beside: names of further signals of the tower, without which a stage is no place for the method.
    """

    scope = "part"
    beside: ClassVar[tuple[str, ...]] = ()
    separators: str

    def sites(self, layout: Layout) -> list[Site]:
        """What the projector gets, or what it made where that reaches the language model with its attention."""
        name, stage = self.place(layout)
        separators = self.separators if stage == "projected" else "keep"
        return [Site(stage, needs=(f"{name}@vision:feature",), separators=separators)]

    def remarks(self, layout: Layout) -> list[str]:
        """Which stage it took where that is not the papers'."""
        return layout.said_of_stage(type(self).__name__, self.place(layout)[1])

    def place(self, layout: Layout) -> tuple[str, str]:
        """The attention by which a tower's tokens are chosen, and the stage."""
        name = "cls_attention" if layout.gives("vision", "cls_attention") else "received_attention"
        return name, layout.feature_stage(type(self).__name__, [name, *self.beside])
