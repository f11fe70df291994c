"""Attention masks for rows that a cut left: built anew by the host's own functions, never gathered.

A mask made before the cut says nothing about caches of other lengths; the 2-D validity of the columns that each layer's
cache holds says all. Every layer type gets its own mask, sized by the layer that asks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import BlockRule

RECURRENT = frozenset({"linear_attention", "conv", "mamba", "hybrid"})
"""Layer types without a key for each token."""


def layer_kinds(config: Any, depth: int) -> list[str]:
    """The attention type of each layer, as masks are told apart."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * depth


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
    from transformers import masking_utils as host

    given: dict[str, Any] = {
        "config": config,
        "inputs_embeds": hidden,
        "attention_mask": valid,
        "past_key_values": cache,
        "position_ids": None,  # gaps would read as packed sequences
        "layer_idx": layer,
    }
    sliding = kind == "sliding_attention"
    how = None
    if blocks is not None and rule is not None:
        how = rule.sliding if sliding else ("or" if rule.full else None)
    if how == "and":
        return host.create_causal_mask(
            **given,
            or_mask_function=host.blockwise_overlay(_reaching(blocks, cache, layer, hidden.shape[1])),
            and_mask_function=host.sliding_window_overlay(config.sliding_window),
        )
    if how == "or":
        given["block_sequence_ids"] = blocks
    if kind in RECURRENT:
        given.pop("layer_idx")
        if cache is not None and hidden.shape[1] == 1:
            return None
        return None if valid is None else valid[:, -hidden.shape[1] :]
    if explicit:
        given["allow_is_causal_skip"] = False
    return host.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](**given)


def _reaching(blocks: Tensor | None, cache: Any, layer: int, count: int) -> Tensor:
    """Block ids for every key that the mask indexes, padded with -1."""
    assert blocks is not None
    length, offset = (blocks.shape[1], 0) if cache is None else cache.get_mask_sizes(count, layer)
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
