"""The driver of a tower that packs all pictures of a call into one row: `Tower`, with boundaries that follow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...errors import PassError, UnsupportedModel
from .. import forms, hosts
from ..base import TowerSpec, child
from ..hosts import Arguments
from .packed_cuts import PackedCuts
from .packed_intake import PackedIntake
from .spreading import spread_out
from .tower import Tower
from .tower_pass import LayerRecord


def check_boundaries(attachment: Attachment, spec: TowerSpec) -> None:
    """Refuses methods inside a tower that keeps pictures apart by what no hook can shorten.

    Args:
        attachment: whose methods.
        spec: the tower as data.

    Raises:
        UnsupportedModel: its blocks take no boundaries, and flash attention no mask.
    """
    kind = forms.implementation(child(spec.blocks[0], spec.block.attn))
    if attachment.at(spec.stage) and spec.block.bounds is None and "flash" in kind:
        raise UnsupportedModel(
            f"{kind} is told by the host's tower itself where pictures begin, which does not follow where tokens "
            "leave inside the tower; load the model with attn_implementation='sdpa' (or 'eager')"
        )


class PackedTower(Tower):
    """Drives a packed tower.

    Methods are shown the finest stretches of patches that see each other, and each is shortened by itself; the
    boundaries that blocks are told, rotary tables and masks follow. Behind the last block, and for what reads the row
    in between, every patch gets its slot's features.

    Args:
        attachment: whose hooks and methods.
        spec: the tower as data.
        raster: whether patches of a picture lie row by row.
    """

    masks_follow = True

    def __init__(self, attachment: Attachment, spec: TowerSpec, raster: bool) -> None:
        assert spec.packed is not None
        check_boundaries(attachment, spec)
        attachment.between_graphs = True  # sizes of pictures are numbers on the host, which a graph cannot hold
        self.form = spec.packed
        self.readers: dict[int, Arguments] = {}
        intake = PackedIntake(attachment, spec, raster)
        super().__init__(attachment, spec, intake, PackedCuts(attachment, spec))  # type: ignore[arg-type]
        intake.install()
        if self.entries:
            for place, reader in enumerate(self.form.readers):
                self.readers[place] = Arguments(reader, [hosts.HIDDEN])
                attachment.hook(reader, "pre", self.read, place)

    def rows(self, x: Tensor) -> Tensor:
        """One row `[1, S, C]` of all that a module works on."""
        return x.unsqueeze(0) if x.dim() == 2 else x.reshape(1, -1, x.shape[-1])

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """The row in the host's own form."""
        return x.squeeze(0) if like.dim() == 2 and x.dim() == 3 else x

    def start(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Block pre-hook; the row as it comes in is what the block's attention sees."""
        found = super().start(layer, module, args, kwargs)
        if not self.reader.muted and not replaying():
            run = self.running.now
            run.inside = (layer, run.segments)  # type: ignore[attr-defined]
        return found

    def bounds(
        self,
        layer: int,
        record: LayerRecord,
        arguments: Arguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        again: bool,
    ) -> dict[hosts.Role, Any]:
        """Where windows and frames begin in the row as it is."""
        role, longest = self.block.bounds, self.block.longest
        if role is None:
            return {}
        if not again:
            run: Any = self.running.now
            given = arguments.get(role, args, kwargs)
            own = run.segments.bounds(self.form.spans[layer])
            if given.shape[0] != len(own):
                raise hosts.changed(
                    self.form.told,
                    f"it tells block {layer} of {given.shape[0] - 1} stretches of its row, where {len(own) - 1} follow "
                    "from the sizes of its pictures",
                )
            record.bounds = given.new_tensor(own) if run.sequence.cuts else None
        if record.bounds is None:
            return {}
        changes: dict[hosts.Role, Any] = {role: record.bounds}
        if longest is not None and arguments.get(longest, args, kwargs) is not None:
            changes[longest] = int(record.bounds.diff().max())
        return changes

    def attend(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention pre-hook; what sizes add is cut where the attention cuts its rows."""
        found = super().attend(layer, module, args, kwargs)
        if self.block.by_name and not self.reader.muted:
            run: Any = self.running.of(replaying())
            record = run.record(layer)
            record.asked = 0
            if not replaying():
                lengths = [b - a for a, b in pairwise(run.segments.bounds(self.form.spans[layer]))]
                record.chunks = None if record.bias is None else record.bias.split(lengths, -1)
        return found

    def added(self, layer: int, q: Tensor) -> Tensor | None:
        """What is added to the logits of the stretch that the attention is called for now."""
        if not self.block.by_name:
            return super().added(layer, q)
        record = self.running.of(replaying()).record(layer)
        if record.chunks is None:
            return None
        if record.asked == len(record.chunks):
            raise hosts.changed(
                self.form.told, f"block {layer} calls its attention for more than {record.asked} stretches of its row"
            )
        record.asked += 1
        return record.chunks[record.asked - 1]

    def masked(
        self,
        layer: int,
        record: LayerRecord,
        x: Tensor,
        arguments: Arguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The host's mask of blocks at the tokens that are left, with what proportional attention adds."""
        if self.block.bias is None:
            return None
        if not replaying():
            record.place = self.running.now.sequence.place
        mask, place = arguments.get(self.block.bias, args, kwargs), record.place
        if place is None:
            return None
        if mask is None:
            raise PassError(
                "the vision tower is called without the mask that keeps its pictures apart, as for flash attention, "
                "and its row got shorter; load the model with attn_implementation='sdpa' (or 'eager')"
            )
        shorter = mask[..., place[0], :][..., place[0]]
        if record.bias is not None and layer not in self.sized:
            shorter = shorter + record.bias
        return arguments.put(args, kwargs, {self.block.bias: shorter})

    def read(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook on what reads the whole row between blocks."""
        run = self.running.of(replaying())
        arguments = self.readers[place]
        given = arguments.get(hosts.HIDDEN, args, kwargs)
        if not run.sequence.cuts or given.shape[-2] == run.sequence.entered:
            return None
        assert run.sequence.source is not None
        whole = spread_out(self.rows(given), run.sequence.source, 1)
        return arguments.put(args, kwargs, {hosts.HIDDEN: self.back(whole, given)})
