"""Books what modules outside the blocks saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.hooks import replaying
from ..core.ledger import StageRun
from ..core.model_shape import LATE, ModelShape, PackedTowerShape, Part
from . import hosts
from .base import Adapter
from .hosts import Arguments

if TYPE_CHECKING:
    from ..core.attachment import Attachment


class Meter:
    """Books the rows that modules outside the blocks saw, and passes through towers that no method touches."""

    def __init__(self, attachment: Attachment, model: nn.Module, shape: ModelShape) -> None:
        self.attachment = attachment
        self.places: list[tuple[str, Part]] = []
        self.stages: list[str] = []
        self.blocks: list[Arguments] = []
        for stage, tower in (("vision", shape.vision), ("text", shape.text)):
            if tower is None:
                continue
            if not attachment.at(stage) and not attachment.tapped(stage):
                first = model.get_submodule(tower.first)
                self.blocks.append(Arguments(first, [hosts.HIDDEN]))
                attachment.hook(first, "pre", self.begin, len(self.stages))
                self.stages.append(stage)
            for part in tower.parts:
                self._put(model, stage, part)
        if shape.packed is not None:
            self._watch(model, shape.packed)
        for part in shape.projector:
            self._put(model, "vision", part)
        self.uncounted = [one.path for one in shape.uncounted if one.path]
        for place, path in enumerate(self.uncounted):
            attachment.hook(model.get_submodule(path), "pre", self.meet, place)
        for inner in () if shape.language is None else (shape.language.head, shape.language.late):
            if inner is not None:
                self._put(model, "decoder", inner)

    def _put(self, model: nn.Module, stage: str, part: Part) -> None:
        if part.path:
            self.attachment.hook(model.get_submodule(part.path), "post", self.note, len(self.places))
            self.places.append((stage, part))

    def _watch(self, model: nn.Module, shape: PackedTowerShape) -> None:
        """Hooks on a tower that takes pictures of any size: its pass begins with its call, which tells the grids."""
        if not self.attachment.at("vision") and not self.attachment.tapped("vision"):  # else its driver begins passes
            tower = model.get_submodule(shape.path)
            told = {*shape.spans} != {"row"}
            self.tower = Arguments(tower, [hosts.TOWER_GRIDS] if told else [])
            self.attachment.hook(tower, "pre", self.open)
            self.attachment.hook(model.get_submodule(shape.first), "pre", self.enter)
        for part in (shape.stem, *shape.parts):
            self._put(model, "vision", part)

    def open(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on such a tower."""
        if torch.compiler.is_compiling() or replaying():
            return
        run = StageRun("vision", 0, 0)
        if self.tower.has(hosts.TOWER_GRIDS):
            grids = self.tower.get(hosts.TOWER_GRIDS, args, kwargs)
            if grids is not None:  # a copy, since hosts and graphs may write the next call's into the same tensor
                run.told = torch.as_tensor(grids).detach().clone()
        self.attachment.ledger.begin(run)

    def enter(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on its first block: how long its rows are."""
        if torch.compiler.is_compiling() or replaying():
            return
        run = self.attachment.ledger.mine.last.get("vision")
        x = hosts.first_tensor(module, args, kwargs)
        if run is not None and not run.entered:
            run.rows, run.entered = (1 if x.dim() == 2 else x.shape[0]), x.shape[-2]

    def meet(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on what is not counted."""
        if not torch.compiler.is_compiling() and not replaying():
            self.attachment.ledger.uncounted.add(self.uncounted[place])

    def begin(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on a tower's first block."""
        if torch.compiler.is_compiling() or replaying():
            return
        x = self.blocks[place].get(hosts.HIDDEN, args, kwargs)
        self.attachment.ledger.begin(StageRun(self.stages[place], x.shape[0], x.shape[1]))

    def note(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook on a part."""
        if torch.compiler.is_compiling() or replaying():
            return
        stage, part = self.places[place]
        x = hosts.first_tensor(module, args, kwargs)
        if part.pools:
            rows = x.shape[0]
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            rows = output.numel() // module.out_channels
        else:
            # What is no linear map itself multiplies what it gives.
            seen = x if hasattr(module, "in_features") else output[0] if isinstance(output, tuple) else output
            rows = seen.numel() // seen.shape[-1]
        self.attachment.ledger.note(stage, part.name, rows, steps=part.name != LATE)


def meter(adapter: Adapter, attachment: Attachment) -> None:
    """Places the hooks that accounting needs; none where the adapter cannot say what its model costs.

    Args:
        adapter: of the model.
        attachment: takes the hooks; its own are in place.
    """
    try:
        shape = adapter.account()
    except NotImplementedError:
        return
    Meter(attachment, adapter.model, shape)
