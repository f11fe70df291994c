"""What vLLM hands over of pictures, as items, and which of them go through the tower together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtok.serving import Item, Left

from .settings import IDS, PLACEHOLDERS, SPEC, STAYS, TEXT, TYPES, as_text

LARGEST = 16
"""Pictures of one pass: vLLM counts the tokens that are left, and admits more pictures than the tower has room for."""

BESIDE = (IDS, TYPES, STAYS, PLACEHOLDERS, SPEC, TEXT)


@dataclass(frozen=True, eq=False)
class Piece:
    """One picture or clip in the engine.

    Attributes:
        index: its place among those that vLLM handed over.
        item: on the model's device.
        left: what stays of it.
        spec: canonical, or empty.
        text: int64 `[T]`, ids of the prompt behind it; empty where no plan reads them.
    """

    index: int
    item: Item
    left: Left
    spec: str
    text: Tensor

    def like(self, other: Piece) -> bool:
        """Whether both can go through the tower in one pass."""
        inputs = [
            {name: (value.shape, value.dtype) for name, value in piece.item.inputs.items()} for piece in (self, other)
        ]
        return (self.spec, *inputs[:1]) == (other.spec, *inputs[1:])

    @property
    def joins(self) -> bool:
        """Whether it is one picture in one row of the tower, with nothing else to tell of it."""
        shapes = [value.shape for value in self.item.inputs.values()]
        return len(shapes) == 1 and len(shapes[0]) == 4 and shapes[0][0] == 1 and not len(self.text)


def pieces(given: Mapping[str, Any], device: torch.device) -> list[Piece]:
    """Pictures and clips of a call.

    Args:
        given: by field; each a tensor or list with an entry for each picture.
        device: of the model.
    """
    by_modality: dict[str, dict[str, Any]] = {}
    for name, values in given.items():
        modality, _, short = name.partition("/")
        by_modality.setdefault(modality, {})[short] = values
    found: list[Piece] = []
    for fields in by_modality.values():
        for index in range(len(fields[IDS])):
            one = {name: values[index] for name, values in fields.items()}
            inputs = {name: value.to(device) for name, value in one.items() if name not in BESIDE}
            item = Item(one[IDS].to(device), inputs, one[TYPES].to(device))
            left = Left(one[STAYS].bool().cpu(), one[PLACEHOLDERS].bool().cpu())
            found.append(Piece(len(found), item, left, as_text(one[SPEC]), one[TEXT].to(device)))
    return found


def batches(given: Sequence[Piece], alone: bool) -> Iterator[list[Piece]]:
    """Pieces that go through the tower together, each once.

    Args:
        given: of a call.
        alone: whether each has positions of its own.
    """
    waiting = list(given)
    while waiting:
        first = waiting[0]
        group = [first]
        if first.joins and not alone:
            group += [piece for piece in waiting[1:] if piece.joins and piece.like(first)][: LARGEST - 1]
        waiting = [piece for piece in waiting if all(piece is not other for other in group)]
        yield group
