"""What the towers of families with squares of patches see, by their hosts' own attention, and which patches a token is
made of, by gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from vlmtok.adapters.language.families import ROWS

from .build import shared

SQUARES = ("internvl", "qianfan_ocr", "smolvlm", "idefics3", "gemma3", "aya_vision", "cohere2_vision")
PREFIX = {"internvl": 1, "qianfan_ocr": 1}
"""Class tokens in front of the patches."""


def tower_of(name: str) -> nn.Module:
    """The tower of a family's eager model."""
    return shared(name, "eager").model.get_submodule(ROWS[name].tower)


def blocks_of(name: str, tower: nn.Module | None = None) -> list[nn.Module]:
    """The blocks of a tower; None takes that of the family's eager model."""
    endings = ("EncoderLayer", "VisionLayer")
    whole = tower_of(name) if tower is None else tower
    return [module for module in whole.modules() if type(module).__name__.endswith(endings)]


def crops_of_prompt(prompt) -> Tensor:
    """Pixels of all crops of a prompt, in order, `[crops, 3, H, W]`."""
    return torch.cat([picture.shot.arrays["pixel_values"].flatten(0, -4) for picture in prompt.pictures])


@functools.cache
def members(name: str) -> Tensor:
    """Patches that a token of the family's model is made of, bool `[n, N]`."""
    return members_in(name, shared(name, "eager"))


@torch.enable_grad()
def members_in(name: str, model: nn.Module) -> Tensor:
    """Patches that each token of one crop is made of, bool `[n, N]`: those of which its gradients speak."""
    side = model.config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    kept: list[Tensor] = []

    def leaf(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    hook = blocks_of(name, model.model.get_submodule(ROWS[name].tower))[-1].register_forward_hook(
        leaf, prepend=True
    )  # in front of what the host itself hangs there to record
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))
    pixels = pixels.unsqueeze(0) if ROWS[name].lengths_of == "crops" else pixels
    features = model.model.get_image_features(pixels, return_dict=True).pooler_output
    hook.remove()
    found = []
    for token in torch.cat([part.reshape(-1, part.shape[-1]) for part in features]):
        (gradient,) = torch.autograd.grad(token.square().sum(), kept[0], retain_graph=True)
        found.append(gradient[0, PREFIX.get(name, 0) :].abs().sum(-1) > 0)
    return torch.stack(found)


def taps(name: str, pixels: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of a block, `[crops, H, L, d]`, and the weights that its host made of them, `[crops, H, L, L]`."""
    made: dict[str, Tensor] = {}
    attn = next(m for m in blocks_of(name)[layer].children() if "Attention" in type(m).__name__)
    after = ("q_norm", "k_norm") if name in PREFIX else ("q_proj", "k_proj")
    hooks = [
        attn.get_submodule(which).register_forward_hook(lambda m, a, out, which=which: made.__setitem__(which[0], out))
        for which in after
    ]
    with torch.no_grad():
        weights = tower_of(name)(pixel_values=pixels, output_attentions=True).attentions[layer]
    for hook in hooks:
        hook.remove()
    q, k = (made[which].unflatten(-1, (weights.shape[1], -1)).transpose(1, 2) for which in "qk")
    return q, k, weights


def outputs_of(name: str, pixels: Tensor, layer: int) -> Tensor:
    """What a block gives, `[crops, L, C]`."""
    given: list[Tensor] = []
    hook = blocks_of(name)[layer].register_forward_hook(lambda m, a, out: given.append(out))
    with torch.no_grad():
        tower_of(name)(pixel_values=pixels)
    hook.remove()
    return given[0][0] if isinstance(given[0], tuple) else given[0]


def at_tokens(name: str, value: Tensor) -> Tensor:
    """Means over the patches of each token: `[crops, N, c]` to `[crops, n, c]`."""
    mine = members(name).to(value.dtype)
    return (mine / mine.sum(1, keepdim=True)) @ value


def signals(name: str, pixels: Tensor, layer: int = -1) -> dict[str, Tensor]:
    """Signals at the tokens of crops, `[crops, n, c]` each."""
    prefix = PREFIX.get(name, 0)
    q, k, weights = taps(name, pixels, layer)
    wide_q, wide_k = (part.transpose(1, 2).flatten(2) for part in (q, k))
    flat = (wide_q @ wide_k.transpose(1, 2) * wide_q.shape[-1] ** -0.5).softmax(-1)
    found = {
        "received_attention": weights.mean((1, 2))[:, prefix:, None],
        "flat_attention": (flat[:, 0] if prefix else flat.mean(1))[:, prefix:, None],
        "turned_keys": k.mean(1)[:, prefix:],
        "turned_keys_full": wide_k[:, prefix:],
        "outputs": outputs_of(name, pixels, layer)[:, prefix:],
    }
    if prefix:
        found["cls_attention"] = weights[:, :, 0, prefix:].transpose(1, 2)
    return {key: at_tokens(name, value) for key, value in found.items()}
