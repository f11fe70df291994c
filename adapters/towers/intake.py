"""What comes into a vision tower: the pixels' grid of patches, and the state that a pass begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.ledger import StageRun
from ...core.sequence import Sequence, TowerRow
from ...core.threads import BlockOrder, PerThread
from .. import hosts
from ..base import TowerSpec
from ..hosts import Arguments
from .checks import check_input, visible_keys
from .tower_pass import Pass, autocast_dtype


def _map_of(output: Any) -> tuple[int, int] | None:
    """Rows and columns of what a patch embedding made: of a map `[B, C, rows, columns]`, or said beside the tokens."""
    if isinstance(output, tuple):
        said = output[-1]
        return (int(said[0]), int(said[1])) if isinstance(said, (tuple, list)) and len(said) == 2 else None
    return (output.shape[-2], output.shape[-1]) if isinstance(output, Tensor) and output.dim() == 4 else None


@dataclass
class LastMap:
    """Rows and columns of the patches of the pixels that came last in a thread, until its pass takes them."""

    size: tuple[int, int] | None = None


class PictureIntake:
    """Begins the passes of a vision tower.

    Args:
        attachment: whose books.
        spec: the tower as data.
    """

    def __init__(self, attachment: Attachment, spec: TowerSpec) -> None:
        self.attachment = attachment
        self.stage = spec.stage
        self.num_prefix = spec.num_prefix
        self.width = spec.width
        self.masked, self.padded = spec.masked, spec.padded
        self.configured = spec.grid
        self.stem = spec.stem is not None
        self.follow = bool(spec.block.rope)
        self.returns_grid = spec.returns_grid
        self.maps = PerThread(LastMap)

    def embed(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook on the patch embedding: notes rows and columns of the pictures that come in."""
        if not replaying():
            self.maps.mine().size = _map_of(output)

    def begin(
        self, module: nn.Module, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any], watch: BlockOrder
    ) -> Pass:
        """Checks the call of block 0 and makes the state of a forward.

        Args:
            module: block 0.
            arguments: of it.
            args: of the call.
            kwargs: of the call.
            watch: how far this thread is.

        Raises:
            PassError: the call brings something that a compression cannot be combined with.
            HostChanged: it brings no row of tokens.
        """
        x = arguments.get(hosts.HIDDEN, args, kwargs)
        check_input(module, x, self.width)
        visible = visible_keys(self.stage, arguments, args, kwargs, self.masked, self.padded)
        run = StageRun(self.stage, x.shape[0], x.shape[1])
        if torch.compiler.is_compiling():
            self.attachment.compiled = True  # no books: each number in them would be a guard, and a call a new graph
        else:
            watch.begin()
            self.attachment.ledger.begin(run)
        n = x.shape[1] - self.num_prefix
        source = None
        if self.attachment.trace or self.returns_grid:
            source = torch.arange(n, device=x.device).expand(x.shape[0], n)
        follow = self.follow or visible is not None
        sequence = Sequence(TowerRow(self.num_prefix, n), n, source=source, follow=follow)
        autocast = autocast_dtype(x.device.type)
        grid = self._grid(n)
        return Pass(sequence, run, grid=grid, grad=torch.is_grad_enabled(), autocast=autocast, visible=visible)

    def _grid(self, n: int) -> tuple[int, int] | None:
        """Rows and columns of the `n` patches of this pass, from the map of its pixels; None where they do not fit."""
        last = self.maps.mine()
        grid, last.size = last.size if self.stem else self.configured, None
        return grid if grid is not None and grid[0] * grid[1] == n else None
