"""Calls of a language model that a cut cannot serve, refused before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError, UnsupportedModel
from ..stream import Stream
from .base import VLMSpec

KNOWN = frozenset({"inputs_embeds", "attention_mask", "position_ids", "input_ids"})
"""Arguments of any text model with one entry for each token."""


def check_call(mask: Any, cache: Any) -> None:
    """Checks the forms of a call's mask and cache.

    Raises:
        CacheError: a cache of one fixed length, or a mask that is not 2-D.
    """
    kind = type(cache).__name__
    if cache is not None and ("Static" in kind or getattr(cache, "is_compileable", False)):
        raise CacheError(
            f"{kind} holds all layers at one fixed length, which a cut breaks; use the default cache "
            "(leave cache_implementation out)"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        what = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise CacheError(f"a cut needs the 2-D attention mask, and the model was called with a {what} one")


def check_arguments(kwargs: Mapping[str, Any], spec: VLMSpec, core: Any, batch: int, columns: int) -> None:
    """Checks that a cut can follow every argument: an unknown one for each token would go out of step.

    Args:
        kwargs: of the text model.
        spec: the family.
        core: the inner model.
        batch: B.
        columns: S.

    Raises:
        UnsupportedModel: a tensor `[B, S, ...]` that nobody told us about.
    """
    known = {*KNOWN, *spec.gather, *(spec.deepstack or ()), spec.types}
    for name, value in kwargs.items():
        if name not in known and isinstance(value, Tensor) and value.shape[:2] == (batch, columns):
            raise UnsupportedModel(
                f"the language model gets {name!r} {list(value.shape)}, one entry for each token, which this "
                f"compression does not know how to cut (family {core.config.model_type!r})"
            )


def check_turn(stream: Stream, columns: int, mask: Tensor | None, positions: Tensor | None) -> None:
    """Checks that a call on a filled cache brings new tokens only.

    Hosts slice full ids by the length of the cache, which a cut made shorter: tokens would be fed twice.

    Args:
        stream: the past.
        columns: S.
        mask: `[B, past + S]`, or None.
        positions: int64 `[..., B, S]`, or None where the caller gave none.

    Raises:
        CacheError: the mask or the first position does not continue the past.
    """
    advice = (
        "pass only the new ids, and an attention_mask of the full length (all turns, pictures uncut); full ids are "
        "sliced by the length of the cut cache, which feeds tokens twice"
    )
    if mask is not None and mask.shape[1] not in (stream.seen + columns, columns):
        raise CacheError(
            f"the cache has seen {stream.seen} columns and this call brings {columns}, but the attention mask has "
            f"{mask.shape[1]}: {advice}"
        )
    if columns > 1 and positions is not None and stream.next is not None:
        text = positions if positions.dim() == 2 else positions[-1]
        first = text[:, 0]
        if mask is not None:
            first = text.gather(1, mask[:, -columns:].to(torch.int64).argmax(1, keepdim=True))[:, 0]
        if not bool(((first == stream.next) | (first == stream.follows)).all()):
            raise CacheError(
                f"the next position is {stream.next.tolist()}, but this call starts at {first.tolist()}: {advice}"
            )
