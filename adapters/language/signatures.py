"""What a text model and its layers call their arguments, read off their signatures before a hook is placed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import hosts
from ..hosts import Arguments
from .spec import VLMSpec


class Signatures:
    """Arguments of a text model and of its layers.

    Args:
        spec: the family.
        lm: the text model.
        probe: the first layer that keeps keys.
        first: the first layer whose arguments change.
        told: layers whose masks are looked at.

    Attributes:
        text: those of the text model.
        layers: those of layers, by number.

    Raises:
        UnsupportedModel: one that must be there is not.
    """

    def __init__(self, spec: VLMSpec, lm: Any, probe: int, first: int, told: Iterable[int]) -> None:
        depth = len(lm.layers)
        of_tokens = [*spec.gather, *(spec.deepstack or ())]
        plain = [hosts.EMBEDDINGS, hosts.MASK, hosts.POSITIONS, hosts.CACHE]
        self.text = Arguments(lm, [*plain, *of_tokens], [hosts.IDS, hosts.LOGITS, hosts.CACHING])
        self.layers: dict[int, Arguments] = {}
        for layer in {probe, *range(1, depth if spec.deepstack is not None else 1), *told}:
            required = [hosts.HIDDEN, hosts.CACHE] if layer == probe else [hosts.HIDDEN]
            self.layers[layer] = Arguments(lm.layers[layer], required, [hosts.CACHE, hosts.MASK])
        for layer in range(first, depth):
            required = [hosts.HIDDEN, hosts.MASK, hosts.ROTARY, hosts.CACHE, *spec.layer_args]
            self.layers[layer] = Arguments(lm.layers[layer], required, [hosts.POSITIONS])
