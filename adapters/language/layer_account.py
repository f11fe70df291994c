"""Layers of language models as counts and widths, told by their modules: mixers, MLPs, experts, what stands beside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...core.mixers import GatedDelta, Mixer, ShortConv
from ...core.model_shape import BlockShape
from .. import hosts
from ..account import block_shape, is_linear, linear_maps, weights

_PICKED = ("top_k", "top_k_experts", "num_experts_per_tok")
"""How routers and configurations call the number of experts that a token is given to."""
_SEEN = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""How configurations call the number of tokens that a layer type sees behind a long past."""


def layer_shape(layer: nn.Module, config: Any, kind: str, size: int) -> BlockShape | None:
    """A layer of a language model, or None where it has weights that no rule here knows.

    Args:
        layer: a mixer, an MLP, maybe experts beside it, and linear maps of its own.
        config: of the language model.
        kind: the layer's type, see `masks.layer_kinds`.
        size: bytes of one number of the hidden states.
    """
    parts: dict[str, Any] = {name: part for name, part in layer.named_children() if has_matrices(part)}
    name = next((name for name, part in parts.items() if name == "self_attn" or mixer_of(part, size)), None)
    if name is None or any(weight.dim() > 1 for weight in layer.parameters(recurse=False)):
        return None
    mixing = parts.pop(name)
    experts, router = parts.pop("experts", None), parts.pop("router", None)
    beside = [parts.pop(other) for other in list(parts) if is_linear(parts[other])]
    if len(parts) != 1:
        return None
    (mlp,) = parts.values()
    mixer = mixer_of(mixing, size)
    block = block_shape(mixing, mlp, int(config.hidden_size), int(config.num_attention_heads), kv_heads(mixing, config))
    if experts is not None:
        found = mixture(experts, router, (), config)
        block = block if found is None else replace(block, mlp=block.mlp + found[0], hidden=block.hidden + found[1])
    elif hasattr(mlp, "experts"):
        within = [part for part in mlp.children() if part not in (mlp.experts, router_of(mlp))]
        found = mixture(mlp.experts, router_of(mlp), within, config)
        block = block if found is None else replace(block, mlp=found[0], hidden=found[1])
    else:
        found = (block.mlp, block.hidden) if _all_linear(mlp) else None
    if found is None or (mixer is None and (not _all_linear(mixing) or holds_latents(mixing))):
        return None
    block = replace(block, beside=sum(map(weights, beside)), mixer=mixer)
    return block if mixer is not None else _attending(block, mixing, config, kind, size)


def _attending(block: BlockShape, attn: Any, config: Any, kind: str, size: int) -> BlockShape:
    """A layer with attention: what it keeps of keys and values, and how far it sees."""
    maps = {path for path, _, _ in linear_maps(attn)}
    shared = "q_proj" in {path.partition(".")[0] for path in maps} and not any(path[:1] in "kv" for path in maps)
    outputs = getattr(getattr(attn, "q_proj", None), "out_features", 0)
    return replace(
        block,
        window=int(getattr(config, _SEEN[kind], None) or 0) if kind in _SEEN else 0,
        kv_bytes=0 if shared else 2 * block.kv_heads * block.head_width * size,
        gated=outputs == 2 * block.heads * block.head_width,
        shared=shared,
    )


def holds_latents(attn: Any) -> bool:
    """Whether a cache holds a latent of each token, and no keys and values of heads (MLA)."""
    return hasattr(attn, "kv_lora_rank")


def kv_heads(attn: Any, config: Any) -> int:
    """Heads of keys and values: as the attention has them, for configurations may name several numbers."""
    outputs = getattr(getattr(attn, "k_proj", None), "out_features", None)
    if outputs is not None and hasattr(attn, "head_dim"):
        return int(outputs) // int(attn.head_dim)
    count = int(config.num_attention_heads)
    if hasattr(attn, "num_key_value_groups"):
        return count // int(attn.num_key_value_groups)
    return int(getattr(config, "num_key_value_heads", None) or count)


def has_matrices(module: nn.Module) -> bool:
    """Whether anything below a module multiplies by more than a vector."""
    return any(weight.dim() > 1 for weight in module.parameters())


def _all_linear(module: nn.Module, *others: Any) -> bool:
    """Whether all matrices of a module are those of linear maps, or given."""
    known = {id(weight) for _, part, _ in linear_maps(module) for weight in part.parameters()} | set(map(id, others))
    return all(weight.dim() < 2 or id(weight) in known for weight in module.parameters())


# ---------------------------------------------------------------------- mixers
def mixer_of(module: Any, size: int) -> Mixer | None:
    """What stands in the place of attention, or None where it is no mixer of a known kind.

    All have one convolution of each channel by itself beside linear maps. One that has no other parameters is a short
    convolution; one with decays, and with widths of keys and values by head, is a gated delta rule.

    Args:
        module: of a layer.
        size: bytes of one number of the hidden states.
    """
    conv: Any = next((part for part in module.modules() if isinstance(part, nn.Conv1d)), None)
    if conv is None or not conv.groups == conv.in_channels == conv.out_channels:
        return None
    if not _all_linear(module, conv.weight):
        return None
    short = ShortConv(conv.in_channels, conv.kernel_size[0], size)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if not own:
        return short
    widths: list[Any] = [getattr(module, name, None) for name in ("num_v_heads", "head_k_dim", "head_v_dim")]
    return GatedDelta(short, *map(int, widths)) if own == {"A_log", "dt_bias"} and None not in widths else None


# ---------------------------------------------------------------------- experts
def router_of(mlp: Any) -> Any:
    """What gives tokens to the experts of a mixture, or None."""
    return getattr(mlp, "gate", None) or getattr(mlp, "router", None)


def mixture(experts: Any, router: Any, others: Iterable[nn.Module], config: Any) -> tuple[int, int] | None:
    """MACs of one token in a mixture of experts, and the hidden channels that it passes; None for another form.

    A token passes the router, the experts that it is given to, and what the mixture has beside them. Experts are
    `[E, rows, columns]` parameters; those whose forward takes no choice all run, for every token.

    Args:
        experts: of the mixture.
        router: of the mixture, or None.
        others: what it has beside them.
        config: of the language model.
    """
    down = getattr(experts, "down_proj", None)
    if not isinstance(down, Tensor) or down.dim() != 3 or router is None:
        return None
    count = int(down.shape[0])
    takes = [p for p in hosts.parameters_of(experts) if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    asked = (getattr(place, name, None) for place in (router, config) for name in _PICKED)
    picked = count if len(takes) == 1 else next((int(number) for number in asked if number is not None), 0)
    each = sum(part.numel() // count for part in experts.parameters() if part.dim() == 3)
    scores = weights(router) or sum(weight.numel() for weight in router.parameters() if weight.dim() == 2)
    beside = [found for part in others for found in linear_maps(part)]
    inner = sum(int(module.in_features) for path, module, _ in beside if path.endswith("down_proj"))
    hidden = picked * down.numel() // (count * int(config.hidden_size)) + inner
    return (picked * each + scores + sum(macs for _, _, macs in beside), hidden) if picked else None
