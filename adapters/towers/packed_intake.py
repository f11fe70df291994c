"""What comes into a packed tower: the sizes of its pictures, and the segments of its row."""

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
from ...errors import PassError
from .. import hosts
from ..base import TowerSpec
from ..hosts import Arguments
from .checks import check_input, check_padding
from .packed_grids import PatchGrid
from .packed_pass import PackedPass
from .packed_segments import Segments
from .tower_pass import autocast_dtype


@dataclass
class Told:
    """What the tower was called with last in a thread, until its first block runs.

    Attributes:
        grids: of the pictures.
        order: of units, see `PackedPass`.
        windows: boundaries of windows, or None.
        by_token: patches of each picture in the order of their tokens, or None.
    """

    grids: list[PatchGrid] | None = None
    order: Tensor | None = None
    windows: list[int] | None = None
    by_token: list[Tensor] | None = None


class PackedIntake:
    """Begins the passes of a packed tower.

    Args:
        attachment: whose books.
        spec: the tower as data.
        raster: whether patches of a picture lie row by row.
    """

    def __init__(self, attachment: Attachment, spec: TowerSpec, raster: bool) -> None:
        assert spec.packed is not None
        self.attachment = attachment
        self.stage, self.width = spec.stage, spec.width
        self.form = spec.packed
        self.raster = raster
        self.told = PerThread(Told)

    def install(self) -> None:
        """Places the hook on what is told sizes."""
        role = self.form.sizes
        self.arguments = Arguments(self.form.told, [hosts.PIXELS if role is None else role])
        self.attachment.hook(self.form.told, "pre", self.measure)

    def measure(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on the tower: sizes of its pictures, and where windows put their patches.

        Raises:
            HostChanged: it was called without sizes, or with some that are no grids of patches.
            PassError: squares of patches that make a token do not fill a picture.
        """
        if replaying():
            return
        role = hosts.PIXELS if self.form.sizes is None else self.form.sizes
        value = self.arguments.get(role, args, kwargs)
        if value is None:
            raise hosts.changed(module, f"it was called without the {role}, so where its pictures lie is not known")
        told = self.told.mine()
        told.grids, told.order, told.windows = self.form.grids(value), None, None
        merge = self.form.merge
        odd = [] if self.form.shared else [grid[1:] for grid in told.grids if grid[1] % merge or grid[2] % merge]
        if odd:
            raise PassError(
                f"a picture of {odd[0][0]} x {odd[0][1]} patches does not fall into squares of {merge} x {merge}, of "
                "which the language model gets one token each; methods that read this tower need pictures that do"
            )
        if self.form.windows is not None:
            told.order, bounds = self.form.windows(torch.as_tensor(value))
            told.windows = torch.as_tensor(bounds).unique_consecutive().tolist()
        if self.form.by_token is not None:
            try:
                told.by_token = self.form.by_token(value, told.grids)
            except ValueError as problem:
                raise hosts.changed(module, f"a picture has {problem}, by the {role}") from None
        if not torch.compiler.is_compiling():
            run = StageRun(self.stage, 0, 0, grids=tuple(told.grids))
            self.attachment.ledger.begin(run)

    def begin(
        self, module: nn.Module, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any], watch: BlockOrder
    ) -> PackedPass:
        """Checks the call of block 0 and makes the state of a forward.

        Args:
            module: block 0.
            arguments: of it.
            args: of the call.
            kwargs: of the call.
            watch: how far this thread is.

        Raises:
            HostChanged: the rows, or what is padding in them, are not those of the pictures that the tower was told of.
        """
        x = arguments.get(hosts.HIDDEN, args, kwargs)
        check_input(module, x, self.width, packed=True)
        told, grids = self.told.mine(), self.told.mine().grids
        places, patches = x.shape[:-1].numel(), 0 if grids is None else sum(f * r * c for f, r, c in grids)
        padded = None if self.form.shared else x.shape[-2]
        if grids is None or (patches != places if padded is None else padded * len(grids) != places):
            raise hosts.changed(
                module, f"its rows are {list(x.shape)}, and the tower was told of {patches} patches in {grids}"
            )
        segments = Segments.of_grids(grids, self.raster and told.windows is None, padded)
        if told.windows is not None:
            segments = segments.windowed(told.windows)
        real = None if padded is None else self._real(segments, told, x.device)
        if real is not None and self.form.masked:
            shown = torch.zeros(places, dtype=torch.bool, device=x.device).index_fill(0, real, True)
            mask = arguments.get(hosts.BIAS, args, kwargs)
            check_padding(module, mask, shown.unflatten(0, x.shape[:-1]))
        run = StageRun(self.stage, 0, 0)
        if torch.compiler.is_compiling():
            self.attachment.compiled = True
        else:
            watch.begin()
            run = self.attachment.ledger.mine.last[self.stage]
            run.rows, run.entered = (1, places) if padded is None else (len(grids), padded)
        source = torch.arange(places, device=x.device).expand(1, places)
        sequence = Sequence(TowerRow(0, places), places, source=source, follow=True)
        order = None if told.order is None else told.order.to(x.device)
        told.grids = None
        return PackedPass(
            sequence,
            run,
            grad=torch.is_grad_enabled(),
            autocast=autocast_dtype(x.device.type),
            segments=segments,
            grids=tuple(grids),
            order=order,
            real=real,
        )

    @staticmethod
    def _real(segments: Segments, told: Told, device: torch.device) -> Tensor:
        """Places of the patches in rows that are padded, in the order that the rule of the family takes them in."""
        places = segments.places(device)
        if told.by_token is not None:
            places = [here[within.to(device)] for here, within in zip(places, told.by_token)]
        return torch.cat(places)
