"""A step at a time, so that no table of all similarities is ever held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP_BYTES = {"cpu": 8 << 20}
"""Bytes of similarities held at a time, by type of device: what a processor keeps near it."""
STEP_BYTES_ELSEWHERE = 256 << 20
"""The same where a step costs launches."""


def in_steps(batch: int, rows: int, columns: int, device: str) -> list[tuple[slice, slice]]:
    """Pictures, and rows of them, to compare at a time, so that no table of all similarities is ever held.

    Args:
        batch: pictures.
        rows: of each.
        columns: what a row is compared with, in fp32.
        device: type of the device.

    Returns:
        Slices of both axes, together everything. One step while torch traces, where sizes may be symbols.
    """
    everything = [(slice(0, batch), slice(0, rows))]
    if torch.compiler.is_compiling():
        return everything
    room = STEP_BYTES.get(device, STEP_BYTES_ELSEWHERE) // (4 * max(columns, 1))
    if batch * rows <= room or rows == 0:
        return everything
    pictures, some = max(1, room // rows), max(1, min(rows, room))
    return [
        (slice(first, min(first + pictures, batch)), slice(at, min(at + some, rows)))
        for first in range(0, batch, pictures)
        for at in range(0, rows, some)
    ]


def in_one(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """What steps gave, as if there had been one."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts]).view(shape)


def rows_at_a_time(most: int, row_bytes: int) -> int:
    """How many rows, `most` at most, make a step where each takes `row_bytes`; `most` of them while torch traces."""
    if torch.compiler.is_compiling():
        return most
    return max(1, min(most, STEP_BYTES_ELSEWHERE // max(row_bytes, 1)))
