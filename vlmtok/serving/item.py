"""One picture or clip of a prompt as a processor lays it out, and what of it stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CLIP = 2
"""Type of a clip's placeholders."""


@dataclass(frozen=True, eq=False)
class Item:
    """One picture or clip, processed by itself.

    Attributes:
        ids: int64 `[L]`, what stands for it in a prompt: placeholders, and marks among them.
        inputs: what the model encodes, by the names of its forward.
        types: int64 `[L]`, 1 for placeholders of a picture, 2 for those of a clip, 0 for marks.
    """

    ids: Tensor
    inputs: Mapping[str, Any]
    types: Tensor


@dataclass(frozen=True, eq=False)
class Left:
    """What of an item's ids stays in the prompt.

    Attributes:
        stays: bool `[L]`. How many placeholders of a run stay is said, not which: the first ones stand for them.
        placeholders: bool `[L]`.
    """

    stays: Tensor
    placeholders: Tensor

    @property
    def rows(self) -> Tensor:
        """int64 `[K]`, which of the ids that stay take an embedding of the item."""
        return self.placeholders[self.stays].nonzero()[:, 0]

    @property
    def counts(self) -> tuple[int, int]:
        """Placeholders before and after."""
        return int(self.placeholders.sum()), int((self.placeholders & self.stays).sum())


def whole(ids: Tensor, placeholders: Tensor) -> Left:
    """An item of which everything stays."""
    return Left(torch.ones_like(ids, dtype=torch.bool), placeholders)
