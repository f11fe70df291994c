"""Tensors, modules and notes without data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


def on_meta(module: nn.Module | None) -> nn.Module | None:
    """A copy of a module without data."""
    if module is None:
        return None
    known: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, known)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Memo(MutableMapping[str, Any]):
    """`TokenView.state` or `row` without data: it keeps the shapes of what was written, not the number of tokens."""

    def __init__(self, kept: dict[str, Any], leading: tuple[int, ...]) -> None:
        self._kept, self._leading = kept, leading

    def __getitem__(self, name: str) -> Any:
        kept = self._kept[name]
        if isinstance(kept, tuple):
            return torch.empty((*self._leading, *kept[0]), dtype=kept[1], device="meta")
        return kept[0]

    def __setitem__(self, name: str, value: Any) -> None:
        fits = isinstance(value, Tensor) and tuple(value.shape[: len(self._leading)]) == self._leading
        self._kept[name] = (tuple(value.shape[len(self._leading) :]), value.dtype) if fits else [value]

    def __delitem__(self, name: str) -> None:
        del self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
