"""A language model's place in front of which everything is as always, and in which nothing runs.

The inner model of transformers makes embeddings, calls its tower, scatters features and makes positions. With a
stand-in for its language model all of that can be had, hooks included, while an engine runs the real one as it does.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import adapter_for
from ..adapters.base import child
from ..errors import PassError


@dataclass(frozen=True, eq=False)
class Caught:
    """What the language model would have been given.

    Attributes:
        rows: `[B, L, C]`, embeddings.
        positions: int64 `[..., B, L]`, or None where the model makes them.
        stacked: `[levels, B, L, C]`, what is added behind the first layers, or None.
    """

    rows: Tensor
    positions: Tensor | None
    stacked: Tensor | None


class StandIn:
    """An inner model with everything of the real one but its language model.

    Args:
        model: of transformers; parts of it are shared, nothing of it is changed.

    Attributes:
        core: the inner model to call and to hook.
        moves: whether tokens of a picture have positions in it (M-RoPE).
    """

    def __init__(self, model: Any) -> None:
        adapter: Any = adapter_for(model)
        if adapter.lm is None:
            raise adapter.refuse("its language model gets no tokens of a picture, but what other modules made of them")
        core, path = adapter.core, adapter.spec.lm
        self.moves = adapter.spec.positions == "mrope"
        self._deep = adapter.spec.deepstack is not None
        self._caught: Caught | None = None
        config = copy.deepcopy(core.config)
        for one in (config, config.get_text_config()):
            one._attn_implementation = "eager"  # all models have it; an engine's own name means nothing here
        with torch.device("meta"):
            bare = type(core)(config)
        text: Any = child(bare, path)
        text.set_input_embeddings(child(core, path).get_input_embeddings())
        self._hollow(text)
        self.core: Any = _grafted(core, path.split("."), text)
        self.core.config = config

    def _hollow(self, text: Any) -> None:
        """Takes out what a language model does; signatures stay, adapters read them."""
        for layer in text.layers:
            layer.forward = functools.wraps(layer.forward)(_identity)
        kind = type(text)
        text.forward = functools.wraps(kind.forward.__get__(text))(functools.partial(self._catch, text))
        # An engine may have put compiled code in the place of the class's call, hooks and all.
        text.__class__ = type(kind.__name__, (kind,), {"__call__": nn.Module.__call__, "__module__": kind.__module__})

    def _catch(
        self, text: Any, *args: Any, inputs_embeds: Tensor, position_ids: Tensor | None = None, **rest: Any
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self._caught = Caught(inputs_embeds, position_ids, self._stacked(text, inputs_embeds) if self._deep else None)
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    def _stacked(self, text: Any, rows: Tensor) -> Tensor | None:
        """What hooks add behind each layer: layers that do nothing are given zeros."""
        nothing, levels = torch.zeros_like(rows), []
        for layer in text.layers:
            given = layer(nothing)
            if given is not nothing:
                levels.append(given)
        # The last layer's own is added behind it, all others in front of the next one.
        return torch.stack(levels) if levels else None

    def __call__(self, **inputs: Any) -> Caught:
        """Calls the inner model as far as its language model.

        Args:
            inputs: of its forward.

        Raises:
            PassError: it never called its language model.
        """
        self._caught = None
        self.core(**inputs, use_cache=False)
        caught, self._caught = self._caught, None
        if caught is None:
            raise PassError(f"{type(self.core).__name__} did not call its language model")
        return caught


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _grafted(module: Any, path: list[str], new: nn.Module) -> Any:
    """A copy of a module that shares everything but what stands at a path."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    first, *rest = path
    twin._modules[first] = _grafted(module._modules[first], rest, new) if rest else new
    return twin
