"""What a model says once entries have left its caches, without a cache: later rows do not see what left.

Nothing here comes from the library under test. The host runs whole (``use_cache=False``) on all tokens so far; hooks on
its decoder layers give each layer a mask of its own, in which rows behind a prompt do not see the columns that left
that layer. Which columns those are is decided outside (`cache_choices`), and rows of the prompt see everything.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gone = Mapping[int, Tensor]
"""By layer: bool `[B, 1 or Hkv, S]`, which of the S columns of a padded prompt later rows do not see."""

MIXERS = ("self_attn", "attn", "attention")
"""Names under which layers keep their attention."""


def text_model(model: nn.Module) -> Any:
    """The decoder of a vision-language model."""
    return next(part for part in model.modules() if hasattr(part, "layers") and hasattr(part, "embed_tokens"))


def attention_of(layer: nn.Module) -> Any:
    """The attention of a decoder layer, or None where it has another mixer."""
    return next((getattr(layer, name) for name in MIXERS if hasattr(layer, name)), None)


def kinds_of(model: nn.Module) -> list[str]:
    """What each decoder layer attends to: ``full_attention``, ``sliding_attention``, ``linear_attention``, ..."""
    lm = text_model(model)
    kinds = getattr(lm.config, "layer_types", None)
    return list(kinds) if kinds else ["full_attention"] * len(lm.layers)


def storing_layers(model: nn.Module) -> dict[int, list[int]]:
    """Full-attention layers that keep keys, and the layers that read them: itself and, with shared keys, later ones."""
    kinds = kinds_of(model)
    shared = int(getattr(text_model(model).config, "num_kv_shared_layers", 0) or 0)
    own = len(kinds) - shared
    found = {layer: [layer] for layer in range(own) if kinds[layer] == "full_attention"}
    for layer in range(own, len(kinds)):
        if kinds[layer] == "full_attention":
            found[max(found)].append(layer)
    return found


def for_readers(model: nn.Module, gone: Gone) -> Gone:
    """The tables of layers that store keys, for every layer that reads them."""
    return {
        reader: gone[layer] for layer, readers in storing_layers(model).items() if layer in gone for reader in readers
    }


class _Masks:
    """Hooks that hide columns; see `hidden`."""

    def __init__(self, model: nn.Module, turns: Sequence[Gone], fired: set[int]) -> None:
        self.turns, self.fired = turns, fired
        lm = text_model(model)
        self.handles = [lm.register_forward_pre_hook(self._start, with_kwargs=True)]
        for index in sorted({layer for gone in turns for layer in gone}):
            layer = lm.layers[index]
            groups = int(getattr(attention_of(layer), "num_key_value_groups", 1))
            hook = self._at(index, groups, inspect.signature(layer.forward))
            self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        assert not given.get("use_cache"), "the oracle has no cache: use_cache=False"
        mask = given.get("attention_mask")
        self.real = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ids = given.get("input_ids")
        self.length = (given["inputs_embeds"] if ids is None else ids).shape[1]

    def _at(self, index: int, groups: int, signature: inspect.Signature) -> Any:
        names = [name for name in signature.parameters if name != "self"]

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = {**dict(zip(names, args)), **kwargs}
            hidden, mask = given["hidden_states"], given.get("attention_mask")
            given["attention_mask"] = self._mask(index, groups, hidden, mask)
            self.fired.add(index)
            return (given.pop(names[0]),), given

        return hook

    def _mask(self, index: int, groups: int, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The host's own mask as what is added to logits, and on it what left."""
        batch, rows, length = *hidden.shape[:2], self.length  # layers with shared keys may run the last rows alone
        least = torch.finfo(hidden.dtype).min
        if mask is None:  # plain causal, nothing padded
            assert self.real is None or bool(self.real.all())
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None, -rows:]
        assert mask.dim() == 4, f"a mask of {list(mask.shape)}"
        seen = mask if mask.dtype == torch.bool else mask > least / 2
        seen = seen.expand(batch, -1, rows, length)
        for gone in self.turns:
            if index not in gone:
                continue
            table = gone[index].repeat_interleave(batch // len(gone[index]), 0)  # beams
            prompt = table.shape[-1]
            if table.shape[1] > 1:
                table = table.repeat_interleave(groups, 1)
            later = torch.arange(length)[-rows:] >= prompt
            seen = seen & ~(later[None, None, :, None] & F.pad(table, (0, length - prompt))[:, :, None, :length])
        return torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, least)


@contextlib.contextmanager
def hidden(model: nn.Module, *turns: Gone) -> Iterator[set[int]]:
    """Context in which rows behind each prompt do not see what left it.

    Args:
        model: of transformers, called without a cache.
        turns: one table a prompt, whose S columns end where later rows begin.

    Yields:
        Layers whose masks were put in so far.
    """
    fired: set[int] = set()
    masks = _Masks(model, turns, fired)
    try:
        yield fired
    finally:
        for handle in masks.handles:
            handle.remove()


@contextlib.contextmanager
def attention_rows(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Context in which a model with eager attention gives what each row attends to: by layer, `[B, H, S, S]`."""
    seen: dict[int, Tensor] = {}
    handles = []
    for index, layer in enumerate(text_model(model).layers):
        attention = attention_of(layer)
        if attention is not None:

            def note(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                seen[index] = output[1].detach()

            handles.append(attention.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
