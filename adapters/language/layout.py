"""What a language model offers to methods: its stages in front of and between layers."""

from __future__ import annotations

from typing import Any

from ...core.signals import AHEAD, DECODER_SIGNALS, NEURONS
from ...core.site import StageLayout
from .attention import attention_form
from .layer_parts import final_norm, last_map
from .masks import RECURRENT, layer_kinds
from .spec import VLMSpec


def language_layout(lm: Any, spec: VLMSpec) -> dict[str, StageLayout]:
    """The stages of a text model.

    Args:
        lm: the text model.
        spec: the family.
    """
    config = lm.config
    depth, width, heads = len(lm.layers), int(config.hidden_size), int(config.num_attention_heads)
    kinds = layer_kinds(config, depth)
    blind = {
        i: RECURRENT.get(kind, "an attention of unknown form")
        for i, kind in enumerate(kinds)
        if kind in RECURRENT or attention_form(lm.layers[i]) is None
    }
    given = frozenset({"text"}) if 0 in blind else frozenset({"text"}) | AHEAD
    return {
        "projected": StageLayout(
            1,
            width,
            0,
            0,
            provides=given,
            renumbers=spec.positions == "1d",
            why=f"decoder layer 0 has no attention rows, but {blind[0]}" if 0 in blind else "",
        ),
        "decoder": StageLayout(
            depth,
            width,
            heads,
            depth - 1,
            frozenset({"start", "end"}),
            frozenset(DECODER_SIGNALS),
            blind=blind,
            lacks=_lacks(lm),
            last_cut=None if spec.last_cut is None else spec.last_cut(config),
            renumbers=spec.positions == "1d",
        ),
    }


def _lacks(lm: Any) -> dict[str, dict[int, str]]:
    """By signal, layers that do not give it, and why."""
    maps = {i: last_map(block) for i, block in enumerate(lm.layers)}
    mixed = {i: found for i, found in maps.items() if isinstance(found, str)}
    unnormed = {} if final_norm(lm) is not None else dict.fromkeys(maps, "a last norm of unknown form")
    lacking = {NEURONS: mixed, "normed": unnormed, "text_normed": unnormed}
    return {name: layers for name, layers in lacking.items() if layers}
