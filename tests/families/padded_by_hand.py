"""What towers whose rows are padded, or end in a class token, see by their hosts' own attention, and which patches a
token is made of, by gradients."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from vlmtok.adapters.language.families import ROWS

from .build import shared
from .prompts import Shot

PADDED = ("lfm2_vl", "gemma4", "llama4")
CLASSED = ("llama4",)
"""Families whose rows end in a class token."""

Arrays = Mapping[str, Tensor]


def core_of(name: str, model: nn.Module) -> Any:
    """The inner model."""
    return model.get_submodule(ROWS[name].core)


def blocks_of(name: str, model: nn.Module) -> list[nn.Module]:
    """The blocks of a tower."""
    whole = core_of(name, model).get_submodule(ROWS[name].tower)
    return [m for m in whole.modules() if type(m).__name__.endswith("EncoderLayer")]


@functools.cache
def depth_of(name: str) -> int:
    """Blocks of a family's tower."""
    return len(blocks_of(name, shared(name)))


def encode(name: str, model: nn.Module, arrays: Arrays) -> Tensor:
    """What the host makes of pictures or of clips: the tokens of all, one after the other, `[T, C]`."""
    core = core_of(name, model)
    call = core.get_video_features if "pixel_values_videos" in arrays else core.get_image_features
    takes = inspect.signature(call).parameters  # older hosts have no number of frames
    made = call(**{key: value for key, value in arrays.items() if key in takes}, return_dict=True)
    if ROWS[name].projects_late:
        return core.multi_modal_projector(made.last_hidden_state.flatten(0, -2))
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in made.pooler_output])


def patches_of(name: str, arrays: Arrays, length: int) -> list[int]:
    """Patches of every row of the tower that are no padding."""
    for key, value in arrays.items():
        if key == "spatial_shapes":
            return value.prod(-1).tolist()
        if key.endswith("position_ids"):
            return (value >= 0).all(-1).sum(-1).tolist()
    return [length - 1] * len(arrays["pixel_values"])


@torch.enable_grad()
def members_of(name: str, arrays: Arrays) -> Tensor:
    """Which places of the tower's rows each token is made of, bool `[T, rows * L]`: those its gradients speak of."""
    model, kept = shared(name, "eager"), []

    def leaf(module: nn.Module, args: tuple, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        kept.append(whole.detach().requires_grad_())
        return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

    hook = blocks_of(name, model)[-1].register_forward_hook(leaf, prepend=True)
    tokens = encode(name, model, arrays)
    hook.remove()
    found = []
    for token in tokens:
        (gradient,) = torch.autograd.grad(token.square().sum(), kept[0], retain_graph=True)
        found.append(gradient.flatten(0, 1).abs().sum(-1) > 0)
    return torch.stack(found)


def seen(name: str, arrays: Arrays, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a block, by the host: q and k behind rope, k before it, `[rows, H, L, d]`, and weights `[rows, H, L, L]`."""
    model, calls, plain = shared(name, "eager"), [], []
    attn: Any = blocks_of(name, model)[layer].self_attn
    host = sys.modules[type(attn).__module__]
    which = "vision_eager_attention_forward" if name == "llama4" else "eager_attention_forward"
    eager = getattr(host, which)

    def listen(module: nn.Module, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output = eager(module, q, k, *args, **kwargs)
        if module is attn:
            calls.append((q, k, output[1]))
        return output

    last = attn.k_norm if hasattr(attn, "k_norm") else attn.k_proj
    hook = last.register_forward_hook(lambda module, args, output: plain.append(output))
    with mock.patch.object(host, which, listen), torch.no_grad():
        encode(name, model, arrays)
    hook.remove()
    ((q, k, weights),) = calls
    before = plain[0] if plain[0].dim() == 4 else plain[0].unflatten(-1, (k.shape[1], -1))
    return q, k, before.transpose(1, 2), weights


def outputs_of(name: str, arrays: Arrays, layer: int) -> Tensor:
    """What a block gives, `[rows, L, C]`."""
    model, given = shared(name, "eager"), []
    hook = blocks_of(name, model)[layer].register_forward_hook(lambda module, args, output: given.append(output))
    with torch.no_grad():
        encode(name, model, arrays)
    hook.remove()
    (output,) = given
    return output[0] if isinstance(output, tuple) else output


def at_patches(name: str, arrays: Arrays, layer: int) -> dict[str, Tensor]:
    """Signals of a block at all places of its rows, `[rows * L, c]`; zeros where there is no patch."""
    q, k, plain, weights = seen(name, arrays, layer)
    length, outputs = k.shape[2], outputs_of(name, arrays, layer)
    found: dict[str, list[Tensor]] = {}
    for row, n in enumerate(patches_of(name, arrays, length)):
        real = n + (name in CLASSED)
        assert (weights[row][:, :real, real:] == 0).all()
        wide_q, wide_k, wide_plain = (x[row].transpose(0, 1)[:real].flatten(1) for x in (q, k, plain))
        flat = (wide_q @ wide_k.T * wide_q.shape[-1] ** -0.5).softmax(-1)
        signals = {
            "received_attention": weights[row, :, :real].mean((0, 1))[:, None],
            "flat_attention": (flat[-1] if name in CLASSED else flat.mean(0))[:, None],
            "turned_keys": k[row].mean(0),
            "turned_keys_full": wide_k,
            "keys": plain[row].mean(0),
            "keys_full": wide_plain,
            "outputs": outputs[row],
        }
        if name in CLASSED:
            signals["cls_attention"] = weights[row, :, -1].T
        for key, value in signals.items():
            found.setdefault(key, []).append(torch.cat([value[:n], value.new_zeros(length - n, value.shape[1])]))
    return {key: torch.cat(values) for key, values in found.items()}


_known: dict[tuple[str, int, int], tuple[Shot, dict[str, Tensor]]] = {}


def of_shot(name: str, shot: Shot, layer: int = -1) -> dict[str, Tensor]:
    """Signals at the tokens of one picture or clip, encoded alone, `[n, c]` each."""
    key = (name, id(shot), layer)
    if key not in _known:  # with the shot, whose id stays
        mine = members_of(name, shot.arrays).float()
        share = mine / mine.sum(1, keepdim=True)
        _known[key] = (shot, {what: share @ value for what, value in at_patches(name, shot.arrays, layer).items()})
    return _known[key][1]
