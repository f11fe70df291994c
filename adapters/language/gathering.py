"""Tokens of all pictures of a packed or padded tower, from what a projector gives, which may see one picture a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import hosts
from ..towers.packed_pass import PackedPass


def gathered(module: nn.Module, output: Tensor, current: PackedPass, merge: int) -> Tensor | None:
    """The tokens in the order of the placeholders.

    Args:
        module: the projector.
        output: `[..., C]`, what it gave.
        current: the pass of the tower before it, which keeps tokens of pictures until all are there.
        merge: patches along the side of a token.

    Returns:
        `[T, C]`; None while pictures are missing.

    Raises:
        HostChanged: it made another number of tokens.
    """
    output = output.flatten(0, -2)
    counts = [frames * rows * columns // merge**2 for frames, rows, columns in current.grids]
    if not current.tokens:
        if len(output) == sum(counts):
            return output
        slots = current.segments.total // len(counts) // merge**2
        if current.real is not None and len(output) == slots * len(counts):
            place = torch.arange(slots, device=output.device)
            return output[torch.cat([place[:count] + i * slots for i, count in enumerate(counts)])]
    seen = len(current.tokens)
    if current.real is None or len(output) != counts[seen]:
        raise hosts.changed(
            module, f"it made {len(output)} tokens of pictures of {list(current.grids)} patches, not {sum(counts)}"
        )
    current.tokens.append(output)
    if len(current.tokens) < len(counts):
        return None
    whole = torch.cat(current.tokens)
    current.tokens.clear()
    return whole
