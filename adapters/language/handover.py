"""What travels with a picture's tokens from the tower to the language model: sizes, signals, which features are real.

What the tower left of a picture fills the picture's first placeholders in slot order; the others leave at the language
model's boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.reduction import Reduction
from ...core.rows import Picture, PromptRows
from ...errors import CacheError


@dataclass(eq=False)
class Handover:
    """What the projector passed on.

    Attributes:
        pictures: P, pictures of the tower's batch.
        entered: placeholders of each.
        slots: K, features of each.
        valid: bool `[P, K]`, or None where all are real.
        size: fp32 `[P, K]`, or None while all are 1.
        carried: signals on their way, with the axis of the tokens.
        probe: `[P, N, c]`, a few channels of the features that the host got, to know them again.
    """

    pictures: int
    entered: int
    slots: int
    valid: Tensor | None = None
    size: Tensor | None = None
    carried: dict[str, tuple[Tensor, int | None]] = field(default_factory=dict)
    probe: Tensor | None = None

    def reduction(self, index: Tensor, n: int) -> Reduction | None:
        """What is left of pictures with n placeholders each.

        Args:
            index: int64 `[G]`, pictures of the tower.
            n: placeholders.

        Returns:
            The reduction, or None where all are left.
        """
        if n != self.entered:
            raise CacheError(
                f"a picture has {n} placeholders where the projector made {self.entered} features; chunked prefill "
                "that splits a picture cannot be combined with cuts before the language model"
            )
        if self.slots == n and self.valid is None:
            return None
        keep = torch.arange(self.slots, device=index.device).expand(len(index), self.slots)
        return Reduction(keep, valid=None if self.valid is None else self.valid[index])


def number_pictures(pictures: list[Picture], handover: Handover | None) -> None:
    """Says which picture of the tower each one is: beams repeat the rows of a sample, one behind the other."""
    if handover is None or not pictures:
        return
    have, seen = handover.pictures, len(pictures)
    if seen % have:
        raise CacheError(
            f"the prompt shows {seen} pictures where the tower encoded {have}: features of an earlier call cannot "
            "be combined with cuts before the language model; encode and ask in one call"
        )
    repeat = seen // have
    base, sample = 0, 0
    for picture in pictures:
        if picture.row // repeat != sample:
            base += sum(1 for p in pictures if p.row == sample * repeat)
            sample = picture.row // repeat
        picture.tower = base + picture.index


def carry_signals(rows: PromptRows, handover: Handover) -> None:
    """Sets sizes and signals of the tower beside the language model's columns."""
    if not handover.carried and handover.size is None:
        return
    for group in rows.groups("picture"):
        index = torch.tensor(
            [next(p.tower for p in rows.pictures if (p.row, p.index) == unit[:2]) for unit in group.units],
            device=rows.label.device,
        )
        slots = None
        if handover.valid is not None:
            slots = torch.argsort((~handover.valid[index]).to(torch.int8), dim=1, stable=True)[:, : group.n]
        if handover.size is not None:
            size = _rows_of(handover.size, index, slots, 1)
            if rows.size is None:
                rows.size = size.new_ones(rows.batch, rows.length)
            rows.size = rows.size.index_put((group.index[:, None], group.columns), size)
        for name, (value, axis) in handover.carried.items():
            if axis is None:  # one for each picture, not for each token
                towers = torch.tensor([picture.tower for picture in rows.pictures], device=value.device)
                rows.carried[name] = (value[towers], None)
                continue
            moved = _rows_of(value, index, slots, axis).movedim(axis, 1)
            if name not in rows.carried:
                rows.carried[name] = (moved.new_zeros(rows.batch, rows.length, *moved.shape[2:]), axis)
            table = rows.carried[name][0]
            rows.carried[name] = (table.index_put((group.index[:, None], group.columns), moved), axis)


def _rows_of(value: Tensor, index: Tensor, slots: Tensor | None, axis: int) -> Tensor:
    """Rows of some pictures, their real slots only."""
    picked = value[index]
    if slots is None:
        return picked
    shape = [1] * picked.dim()
    shape[0], shape[axis] = slots.shape
    target = list(picked.shape)
    target[axis] = slots.shape[1]
    return picked.gather(axis, slots.reshape(shape).expand(target))
