"""Attention masks for rows that a cut left: built anew by the host's own functions, never gathered.

A mask made before the cut says nothing about caches of other lengths; the 2-D validity of the columns that each layer's
cache holds says all. Every layer type gets its own mask, sized by the layer that asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModel
from .. import host_objects, hosts
from ..hosts import Role
from .spec import BlockRule

RECURRENT = {
    "linear_attention": "linear attention",
    "conv": "a convolution",
    "mamba": "a state space model",
    "hybrid": "a state space model beside attention",
}
"""Layer types without a key for each token, and what such a layer has instead."""


def layer_kinds(config: Any, depth: int) -> list[str]:
    """The attention type of each layer, as masks are told apart."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * depth


def sources(config: Any, kinds: list[str]) -> dict[int, int]:
    """Layers that keep no keys of their own, and the layer whose keys each reads.

    Args:
        config: of the text model.
        kinds: type of each layer.
    """
    first = len(kinds) - int(getattr(config, "num_kv_shared_layers", 0) or 0)
    storing = {kind: i for i, kind in enumerate(kinds[:first])}  # the last one of each type
    return {i: storing[kinds[i]] for i in range(first, len(kinds)) if kinds[i] in storing}


def build_mask(
    config: Any,
    kind: str,
    hidden: Tensor,
    valid: Tensor | None,
    cache: Any,
    layer: int,
    blocks: Tensor | None = None,
    rule: BlockRule | None = None,
    explicit: bool = False,
) -> Any:
    """The mask of one layer type.

    Args:
        config: of the text model.
        kind: layer type.
        hidden: `[B, L, C]`, the rows.
        valid: bool `[B, past + L]`, or None where all columns are real.
        cache: the cache, or None.
        layer: whose cache length counts.
        blocks: int64 `[B, past + L]`, bidirectional block of each column, -1 none; or None.
        rule: how blocks enter each layer type.
        explicit: never None, also where plain causality would do.

    Returns:
        What the host's attention takes.
    """
    if kind == "full_attention" and hidden.shape[1] == 1:
        blocks = None  # a row alone sees all before it: without blocks the host can leave the mask out
    make, given = _recipe(kind, rule if blocks is not None else None)
    if make is None:
        if cache is not None and hidden.shape[1] == 1:
            return None
        return None if valid is None else valid[:, -hidden.shape[1] :]
    values: dict[Role, Any] = {
        hosts.CONFIG: config,
        hosts.EMBEDDINGS: hidden,
        hosts.MASK: valid,
        hosts.CACHE: cache,
        hosts.POSITIONS: None,  # gaps would read as packed sequences
        hosts.LAYER: layer,
        hosts.BLOCKS: blocks,
        hosts.MAY_SKIP: False,
    }
    if hosts.OR_MASK in given:
        from transformers import masking_utils as host

        values[hosts.OR_MASK] = host.blockwise_overlay(_reaching(blocks, cache, layer, hidden.shape[1]))
        values[hosts.AND_MASK] = host.sliding_window_overlay(config.sliding_window)
    if not explicit:
        given = [role for role in given if role != hosts.MAY_SKIP]
    return make(**hosts.named(make, {role: values[role] for role in given}))


def weighed(mask: Tensor, bias: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """A mask with what is added to the logits of merged entries.

    Args:
        mask: bool or floating `[B, 1, L, K]`, as `build_mask` makes it when it must be explicit.
        bias: fp32 `[B, Hkv, past]`, of the entries that the cache held; new ones get none.
        dtype: of the mask to make.
        heads: of queries.

    Returns:
        `[B, heads, L, K]`.
    """
    added = torch.nn.functional.pad(bias, (0, mask.shape[-1] - bias.shape[2]))
    added = added.repeat_interleave(heads // bias.shape[1], 1)[:, :, None].to(dtype)
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, added, least)
    return torch.where(mask <= least, least, mask.to(dtype) + added)


def _recipe(kind: str, rule: BlockRule | None) -> tuple[Callable[..., Any] | None, list[Role]]:
    """The host's function for a layer type, and what it is handed; None where layers keep no keys.

    Args:
        kind: layer type.
        rule: how bidirectional blocks enter, where there are any.

    Raises:
        UnsupportedModel: the host has no such function.
    """
    from transformers import masking_utils as host

    if kind in RECURRENT:
        return None, []
    common = [hosts.CONFIG, hosts.EMBEDDINGS, hosts.MASK, hosts.CACHE, hosts.POSITIONS, hosts.LAYER]
    sliding = kind == "sliding_attention"
    how = None if rule is None else rule.sliding if sliding else ("or" if rule.full else None)
    if how == "and":
        for part in ("create_causal_mask", "blockwise_overlay", "sliding_window_overlay"):
            if not hasattr(host, part):
                raise UnsupportedModel(f"transformers {hosts.version_of('transformers')} has no {part}() for masks")
        return host.create_causal_mask, [*common, hosts.OR_MASK, hosts.AND_MASK]
    make = host.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind)
    if make is None:
        raise UnsupportedModel(
            f"transformers {hosts.version_of('transformers')} has no mask function for {kind!r} layers, by which masks "
            f"behind a cut are made; it has {', '.join(host.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)}"
        )
    return make, [*common, hosts.MAY_SKIP, *([hosts.BLOCKS] if how == "or" else [])]


def check_mask(kind: str, rule: BlockRule | None) -> None:
    """Checks that the host's function for a layer type takes what it will be handed.

    Args:
        kind: layer type.
        rule: how bidirectional blocks enter, or None.

    Raises:
        UnsupportedModel: it does not.
    """
    for blocks in {None, rule}:
        make, given = _recipe(kind, blocks)
        if make is not None:
            hosts.named(make, dict.fromkeys(given))


def _reaching(blocks: Tensor | None, cache: Any, layer: int, count: int) -> Tensor:
    """Block ids for every key that the mask indexes, padded with -1."""
    assert blocks is not None
    length, offset = (blocks.shape[1], 0) if cache is None else host_objects.span_of(cache, cache, count, layer)
    missing = length + offset - blocks.shape[1]
    return torch.nn.functional.pad(blocks, (0, missing), value=-1) if missing > 0 else blocks


def block_ids(types: Tensor, rule: BlockRule, first: int) -> Tensor:
    """Bidirectional block of each new column.

    Args:
        types: int `[B, S]`, type ids of the columns.
        rule: which types form blocks.
        first: original number of the first column, so that blocks of different turns differ.

    Returns:
        int64 `[B, S]`, -1 where a column is in no block.
    """
    inside = torch.isin(types, torch.tensor(rule.types, device=types.device))
    if not rule.runs:
        return torch.where(inside, 0, -1)
    before = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    column = torch.arange(first, first + types.shape[1], device=types.device).expand_as(types)
    start = torch.where(inside & ~before, column, -1)
    return torch.where(inside, start.cummax(1).values, -1)
