"""A prompt as it would be with whole pictures, from which its positions follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .settings import IDS, PLACEHOLDERS, STAYS, TYPES, field


@dataclass(frozen=True)
class Whole:
    """A prompt with whole pictures.

    Attributes:
        ids: its tokens.
        types: 0 text, 1 placeholders of pictures, 2 of clips.
        stays: which of them the shortened prompt has.
        begins: for placeholders the column of their picture's first id, else -1.
    """

    ids: list[int]
    types: list[int]
    stays: list[bool]
    begins: list[int]

    def shortened(self, positions: Tensor) -> Tensor:
        """Positions of the shortened prompt: placeholders have that of their picture's first id.

        Args:
            positions: int64 `[3, L]`, of the whole prompt.
        """
        begins = torch.tensor(self.begins)
        columns = torch.arange(len(self.ids))
        first = positions[:, torch.where(begins >= 0, begins, columns)]
        return first[:, torch.tensor(self.stays)].contiguous()


def whole_prompt(tokens: Sequence[int], features: Sequence[Any]) -> Whole:
    """Puts back what plans took out.

    Args:
        tokens: of the shortened prompt.
        features: vLLM's, of its pictures and clips.
    """
    ids: list[int] = []
    types: list[int] = []
    stays: list[bool] = []
    begins: list[int] = []

    def text(upto: int, start: int) -> None:
        piece = list(tokens[start:upto])
        ids.extend(piece)
        types.extend([0] * len(piece))
        stays.extend([True] * len(piece))
        begins.extend([-1] * len(piece))

    done = 0
    for feature in sorted(features, key=lambda one: one.mm_position.offset):
        offset, length = feature.mm_position.offset, feature.mm_position.length
        text(offset, done)
        given = {name: feature.data[field(feature.modality, name)].data for name in (IDS, TYPES, STAYS, PLACEHOLDERS)}
        begin = len(ids)
        ids.extend(given[IDS].tolist())
        types.extend(given[TYPES].tolist())
        stays.extend(given[STAYS].bool().tolist())
        begins.extend([begin if one else -1 for one in given[PLACEHOLDERS].tolist()])
        done = offset + length
    text(len(tokens), done)
    return Whole(ids, types, stays, begins)
