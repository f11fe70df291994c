"""What an adapter says of a tower, and a method that notes the grids it is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vlmtok.adapters import adapter_for
from vlmtok.adapters.base import TowerSpec

import vlmtok


def spec_of(model: nn.Module) -> TowerSpec:
    adapter = adapter_for(model)
    if hasattr(adapter, "vision") and not callable(adapter.vision):  # open_clip's dual encoders
        adapter = adapter.vision
    found = getattr(adapter, "inner", adapter).tower()
    assert found is not None
    return found


class Grids(vlmtok.Method):
    """Notes the grids that views tell, and halves them."""

    proportional = False

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def sites(self, layout: Any) -> list[vlmtok.Site]:
        return [vlmtok.Site("vision", layer, point) for layer, point in ((0, "start"), (1, "mid"), (2, "end"))]

    def reduce(self, view: Any) -> vlmtok.Reduction:
        self.seen.append(view.grid)
        return vlmtok.Reduction(torch.arange(0, view.tokens.shape[1] - 1).expand(view.tokens.shape[0], -1))

    def count(self, counts: Any) -> int:
        return counts.n - 1

    def __str__(self) -> str:
        return "grids"
