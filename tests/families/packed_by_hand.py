"""What towers that pack all pictures in one row see, by their hosts' own attention, and which patches a token is made
of, by gradients."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from unittest import mock

import torch
from torch import Tensor, nn
from vlmtok.adapters.language.families import ROWS

from .build import shared
from .prompts import Shot

QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v")
PACKED = (*QWENS, "paddleocr_vl", "mistral3")

Arrays = Mapping[str, Tensor]


def blocks_of(name: str, model: nn.Module | None = None) -> list[nn.Module]:
    """The blocks of a tower; None takes that of the family's eager model."""
    whole = (shared(name, "eager") if model is None else model).model.get_submodule(ROWS[name].tower)
    return [m for m in whole.modules() if type(m).__name__.endswith(("VisionBlock", "EncoderLayer", "AttentionLayer"))]


def attention_of(block: nn.Module) -> nn.Module:
    """The attention of a block."""
    return next(m for m in block.children() if "Attention" in type(m).__name__)


def encode(model: nn.Module, arrays: Arrays) -> Tensor:
    """What the host makes of pictures or of clips: the features of all, one after the other, `[T, C]`."""
    call = model.model.get_video_features if "pixel_values_videos" in arrays else model.model.get_image_features
    made = call(**arrays, return_dict=True).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in made])


def frames_of(arrays: Arrays) -> list[int]:
    """Patches of every frame of the pictures, in order."""
    for key, value in arrays.items():
        if key.endswith("grid_thw"):
            return [rows * columns for frames, rows, columns in value.tolist() for _ in range(frames)]
    return [(rows // 8) * (columns // 8) for rows, columns in arrays["image_sizes"].tolist()]


@torch.enable_grad()
def members_of(name: str, arrays: Arrays, model: nn.Module | None = None) -> Tensor:
    """Patches of the tower's row that each token is made of, bool `[T, L]`: those of which its gradients speak."""
    model = shared(name, "eager") if model is None else model
    kept: list[Tensor] = []

    def leaf(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    hook = blocks_of(name, model)[-1].register_forward_hook(leaf, prepend=True)
    try:
        tokens = encode(model, arrays)
    finally:
        hook.remove()
    found = []
    for token in tokens:
        (gradient,) = torch.autograd.grad(token.square().sum(), kept[0], retain_graph=True)
        found.append(gradient.reshape(-1, gradient.shape[-1]).abs().sum(-1) > 0)
    return torch.stack(found)


def seen(name: str, arrays: Arrays, layer: int, model: nn.Module | None = None) -> dict[str, Tensor]:
    """What a block's attention computes from the row, by the host's own functions.

    Returns:
        ``weights`` `[H, L, L]`, zero where patches do not see each other; ``k`` and ``q`` behind rope, ``plain`` k
        before it, `[H, L, d]`; ``outputs`` of the block, `[L, C]`.
    """
    model = shared(name, "eager") if model is None else model
    attn, plain = attention_of(blocks_of(name, model)[layer]), []
    host = sys.modules[type(attn).__module__]
    eager, calls = host.eager_attention_forward, []

    def listen(module: nn.Module, q: Tensor, k: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        output = eager(module, q, k, *args, **kwargs)
        if module is attn:
            calls.append((q[0], k[0], output[1][0]))
        return output

    fused = hasattr(attn, "qkv")
    hook = (attn.qkv if fused else attn.k_proj).register_forward_hook(lambda m, args, output: plain.append(output))
    given: list[Tensor] = []
    behind = blocks_of(name, model)[layer].register_forward_hook(lambda m, args, output: given.append(output))
    with mock.patch.object(host, "eager_attention_forward", listen), torch.no_grad():
        encode(model, arrays)
    hook.remove()
    behind.remove()
    q, k = (torch.cat([call[i] for call in calls], 1) for i in (0, 1))
    row = plain[0].reshape(-1, plain[0].shape[-1])
    keys = row.chunk(3, -1)[1] if fused else row
    weights = torch.zeros(len(k), k.shape[1], k.shape[1])
    at = 0
    for _, _, part in calls:
        weights[:, at : at + part.shape[1], at : at + part.shape[1]] = part
        at += part.shape[1]
    stretches = [call[0].shape[1] for call in calls] if len(calls) > 1 or "image_sizes" not in arrays else None
    return {
        "weights": weights,
        "q": q,
        "k": k,
        "plain": keys.unflatten(-1, (len(k), -1)).transpose(0, 1),
        "outputs": given[0].reshape(-1, given[0].shape[-1]),
        "stretches": torch.tensor(frames_of(arrays) if stretches is None else stretches),
    }


def at_patches(name: str, arrays: Arrays, layer: int, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Signals of a block at the patches of the row, `[L, c]` each."""
    made = seen(name, arrays, layer, model)
    rows = torch.tensor([n for n in frames_of(arrays) for _ in range(n)])  # of the frame of each patch
    wide_q, wide_k, plain = (made[which].transpose(0, 1).flatten(1) for which in ("q", "k", "plain"))
    flat, at = torch.zeros(len(rows)), 0
    for n in made["stretches"].tolist():
        q, k = wide_q[at : at + n], wide_k[at : at + n]
        flat[at : at + n] = (q @ k.T * q.shape[-1] ** -0.5).softmax(-1).sum(0)
        at += n
    return {
        "received_attention": (made["weights"].mean(0).sum(0) / rows)[:, None],
        "flat_attention": (flat / rows)[:, None],
        "turned_keys": made["k"].mean(0),
        "turned_keys_full": wide_k,
        "keys": made["plain"].mean(0),
        "keys_full": plain,
        "outputs": made["outputs"],
    }


def at_tokens(name: str, arrays: Arrays, layer: int = -1, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Signals of a block at the tokens of pictures in the order of their placeholders, `[T, c]` each."""
    mine = members_of(name, arrays, model).float()
    share = mine / mine.sum(1, keepdim=True)
    return {key: share @ value for key, value in at_patches(name, arrays, layer, model).items()}


_known: dict[tuple[str, int, int], tuple[Shot, dict[str, Tensor]]] = {}


def of_shot(name: str, shot: Shot, layer: int = -1) -> dict[str, Tensor]:
    """Signals at the tokens of one picture or clip, encoded alone."""
    key = (name, id(shot), layer)
    if key not in _known:  # with the shot, whose id stays
        _known[key] = (shot, at_tokens(name, shot.arrays, layer))
    return _known[key][1]


@functools.cache
def depth_of(name: str) -> int:
    """Blocks of a family's tower."""
    return len(blocks_of(name))
