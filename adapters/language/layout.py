"""What a language model offers to methods: its stages in front of and between layers."""

from __future__ import annotations

from typing import Any

from ...core.signals import AHEAD, CACHE_SIGNALS, DECODER_SIGNALS, MASSES, NEURONS
from ...core.site import StageLayout
from ..account import head_width
from .attention import attention_form
from .layer_account import holds_latents, kv_heads
from .layer_parts import final_norm, last_map
from .masks import RECURRENT, layer_kinds, sources
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
        "cache": cache_layout(lm, kinds),
    }


def cache_layout(lm: Any, kinds: list[str]) -> StageLayout:
    """The key-value cache: layers that hold entries of all that came, each its own.

    Args:
        lm: the text model.
        kinds: type of each layer.
    """
    config, depth = lm.config, len(kinds)
    read = sources(config, kinds)
    without = {i: _held(kind, read.get(i), lm.layers[i]) for i, kind in enumerate(kinds)}
    blind = {i: why for i, why in without.items() if why}
    open_to_cuts = [i for i in range(depth) if i not in blind]
    attention = getattr(lm.layers[open_to_cuts[0]], "self_attn", None) if open_to_cuts else None
    heads = kv_heads(attention, config)
    width = heads * head_width(attention, int(config.hidden_size), int(config.num_attention_heads))
    unknown = {i: "an attention of unknown form" for i in open_to_cuts if attention_form(lm.layers[i]) is None}
    return StageLayout(
        depth,
        width,
        heads,
        depth - 1,
        provides=CACHE_SIGNALS,
        blind=blind,
        lacks=dict.fromkeys(MASSES, unknown) if unknown else {},
        whole="" if open_to_cuts else f"no layer's entries can leave: {blind[0]}",
    )


def _held(kind: str, source: int | None, block: Any) -> str:
    """Why entries of a layer cannot leave; empty where they can."""
    if kind in RECURRENT:
        return f"it has no entry for each token, but {RECURRENT[kind]}"
    if source is not None:
        return f"it reads the entries of layer {source}"
    if kind != "full_attention":
        return f"it holds a window of entries alone ({kind})"
    if holds_latents(getattr(block, "self_attn", None)):
        return "it holds a latent of each token, and no keys and values of heads (MLA)"
    return ""


def _lacks(lm: Any) -> dict[str, dict[int, str]]:
    """By signal, layers that do not give it, and why."""
    maps = {i: last_map(block) for i, block in enumerate(lm.layers)}
    mixed = {i: found for i, found in maps.items() if isinstance(found, str)}
    unnormed = {} if final_norm(lm) is not None else dict.fromkeys(maps, "a last norm of unknown form")
    lacking = {NEURONS: mixed, "normed": unnormed, "text_normed": unnormed}
    return {name: layers for name, layers in lacking.items() if layers}
