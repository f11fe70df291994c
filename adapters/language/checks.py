"""Calls of a language model that a cut cannot serve, refused before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.stream import Stream
from ...errors import CacheError, UnsupportedModel
from .. import host_objects, hosts
from .call import Call
from .spec import VLMSpec

KNOWN = (hosts.EMBEDDINGS, hosts.MASK, hosts.POSITIONS, hosts.IDS)
"""Arguments of any text model with one entry for each token."""
ORIGIN = 1
"""The first position of hosts that count from one."""


def check_start(
    module: Any, columns: int, held: int, outer: Any, own: Any, positions: Tensor | None, cache: Any
) -> None:
    """Checks that a call without a past begins something.

    Args:
        module: the text model.
        columns: S.
        held: columns that the cache holds, as far as one was seen.
        outer: the mask that the inner model got, and
        own: the text model's.
        positions: int64 `[..., B, S]`, or None.
        cache: that was seen, or None.

    Raises:
        HostChanged: it goes on with something, and no cache was seen.
    """
    if held:
        return
    seen = "no cache" if cache is None else "an empty cache"
    for mask in (outer, own):
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > columns:
            raise hosts.changed(
                module,
                f"a call brings {columns} new columns and a mask of {mask.shape[1]}, so it goes on with something, and "
                f"{seen} was seen among its arguments",
            )
    alone = columns == 1 and isinstance(positions, Tensor) and not torch.compiler.is_compiling()
    if alone and (at := int(positions.min())) > ORIGIN:  # type: ignore[union-attr]
        raise hosts.changed(
            module,
            f"a call brings one column at position {at}, so it goes on with something, and {seen} was seen among its "
            "arguments",
        )


def check_hidden(module: Any, call: Call, hidden: Tensor) -> None:
    """Checks that a layer's hidden states are the rows that are known.

    Raises:
        HostChanged: another form.
    """
    assert call.rows is not None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (call.rows.batch, call.rows.length):
        what = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise hosts.changed(
            module, f"its hidden states are {what}, where [{call.rows.batch}, {call.rows.length}, C] are on their way"
        )


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


def check_checkpointing(module: Any) -> None:
    """Before a language model whose layers are cut runs.

    Raises:
        UnsupportedModel: gradient checkpointing runs hooks on layers again, on rows that were cut already.
    """
    if not module.training or not torch.is_grad_enabled():
        return
    if any(host_objects.checkpoints_whole_calls(layer) for layer in module.layers):
        raise UnsupportedModel(
            f"{hosts.library_of(module)} runs whole layers again with gradient checkpointing, hooks included, so cuts "
            "inside the language model cannot be followed; use transformers 5.23 or later, cuts before the language "
            "model, or no checkpointing of it"
        )


def unknown_argument(
    given: Mapping[str, Any], names: Collection[str], spec: VLMSpec, core: Any, batch: int, columns: int, held: int = 0
) -> str | None:
    """Why rows of a call cannot be cut: an argument with one entry for each token that a cut cannot follow.

    Args:
        given: all arguments of the text model, by name.
        names: of those that its signature names.
        spec: the family.
        core: the inner model.
        batch: B.
        columns: S.
        held: columns that the cache holds.

    Returns:
        A sentence about a tensor `[B, S, ...]`, `[B, past + S]`, `[axes, B, S]` or `[S]` that nobody told us about, or
        None.
    """
    roles = [*KNOWN, *spec.gather, *(spec.deepstack or ()), *([] if spec.types is None else [spec.types])]
    known = {name for role in roles for name in role.names} | _passing(names)
    for name, value in given.items():
        for part in _tensors(value) if name not in known else ():
            shape = tuple(part.shape)
            alike = shape[:2] == (batch, columns) or shape == (batch, held + columns) or shape[1:] == (batch, columns)
            square = len(shape) == 4 and shape[-2:] == (columns, held + columns)  # a mask, or attention logits
            if alike or square or (shape == (columns,) and columns > 1):
                return (
                    f"the language model gets {name!r} {list(shape)}, one entry for each token, which this compression "
                    f"does not know how to cut (family {core.config.model_type!r}, {hosts.library_of(core)})"
                )
    return None


def _passing(names: Collection[str]) -> set[str]:
    """What hosts hand on without reading it; a module that names one of these itself would read it."""
    roles = (hosts.LOSS, hosts.TOKEN_TYPES, hosts.MODAL_TYPES)
    return {name for role in roles for name in role.names if name not in names}


def packed(positions: Tensor, mask: Any, cache: Any, caching: bool) -> str | None:
    """Why rows cannot be cut where several prompts are packed in one of them, or None.

    Hosts keep prompts apart by positions that do not go on by one, where neither mask nor cache say more.

    Args:
        positions: int64 `[..., B, S]`, as the caller gave them.
        mask: of the call, or None.
        cache: of the call, or None.
        caching: whether the text model makes a cache.
    """
    if mask is not None or cache is not None or caching or (positions.dim() == 3 and len(positions) == 3):
        return None
    text = positions if positions.dim() == 2 else positions[0]
    if text.shape[-1] < 2 or not bool((text.diff(dim=-1) != 1).any()):
        return None
    return (
        "several prompts are packed in one row (position ids that do not go on by one, and no attention mask), and "
        "behind a cut the second would look at the first; give each prompt a row of its own, or an attention mask"
    )


def _tensors(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """Tensors in an argument: itself, or what a container or an object holds."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, (str, torch.nn.Module, type)):
        inside: Any = ()
        if isinstance(value, Mapping):
            inside = value.values()
        elif isinstance(value, (list, tuple)):
            inside = value
        elif not isinstance(value, host_objects.cache_class()) and hasattr(value, "__dict__"):
            inside = vars(value).values()
        for part in inside:
            yield from _tensors(part, depth - 1)


def check_layer(module: Any, given: Mapping[str, Any], names: Collection[str], spec: VLMSpec, hidden: Tensor) -> None:
    """The same for the arguments of a layer behind which, or at whose start, rows are cut.

    Args:
        module: the layer.
        given: its arguments, by name.
        names: of those that its signature names.
        spec: the family.
        hidden: `[B, L, C]`, its input.

    Raises:
        UnsupportedModel: a tensor `[B, L, ...]` that nobody told us about.
    """
    roles = (hosts.HIDDEN, hosts.MASK, hosts.ROTARY, hosts.CACHE, hosts.POSITIONS, *spec.layer_args)
    known = {name for role in roles for name in role.names} | _passing(names)
    for name, value in given.items():
        if name not in known and isinstance(value, Tensor) and value.shape[:2] == hidden.shape[:2]:
            raise UnsupportedModel(
                f"{type(module).__name__} of {hosts.library_of(module)} gets {name!r} {list(value.shape)}, one entry "
                "for each token, which this compression does not know how to cut"
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
