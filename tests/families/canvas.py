"""The way of tower signals onto canvases and pooled frames by hand, and what of a tower they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from .build import shared
from .shots import PATCH, SIDE

EDGE = SIDE // PATCH


def layer_of(model, layer):
    """The tower's block that a signal's ``layer`` means: ``"feature"`` or ``"-1"``."""
    depth = model.config.vision_config.num_hidden_layers
    feature = model.config.vision_feature_layer
    return (depth + feature if feature < 0 else feature - 1) if layer == "feature" else depth - 1


def attention_of(name, pixels, layer):
    """The signal of each crop by the tower's own attention: `[crops, H, N]` of the class token, or `[crops, 1, N]`."""
    model = shared(name, "eager")
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_attentions=True)
    attention = tower.attentions[layer_of(model, layer)]
    return attention[:, :, 0, 1:] if name == "llava_next" else attention.mean((1, 2)).unsqueeze(1)


def canvas_by_hand(crops, picture):
    """`[crops, H, N]` as a thumbnail and a canvas `[H, n]`: crops side by side, padding cut off, 0 behind each row."""
    heads = crops.shape[1]
    tiles = crops.unflatten(-1, (EDGE, EDGE))
    down, across = (side // SIDE for side in picture.canvas)
    whole = torch.zeros(heads, down * EDGE, across * EDGE)
    for i in range(down * across):
        top, left = i // across * EDGE, i % across * EDGE
        whole[:, top : top + EDGE, left : left + EDGE] = tiles[1 + i]
    rows, columns = picture.unpadded()
    top, left = (whole.shape[1] - rows) // 2, (whole.shape[2] - columns) // 2
    shown = whole[:, top : top + rows, left : left + columns]
    lines = torch.cat([shown, torch.zeros(heads, rows, 1)], -1).flatten(1)
    return torch.cat([crops[0], lines], 1)


def crops_of(name, picture, layer="feature"):
    """The signal of each crop of a picture, without those that fill the batch, `[crops, H, N]`."""
    pixels = picture.shot.arrays["pixel_values"][0]
    return attention_of(name, real_crops(pixels), layer)


def real_crops(pixels):
    """Crops without those that fill the batch."""
    return pixels[pixels.flatten(1).abs().sum(1) > 0]


def halved(values):
    """Means of 2 x 2 neighbours, which is what bilinear interpolation to half the size takes: `[..., 2 r, 2 c]`."""
    return sum(values[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4


def projections_of(name, pixels, layer) -> tuple[Tensor, Tensor]:
    """q and k of a tower's block, `[crops, L, C]`, class token first where there is one."""
    model, made = shared(name, "eager"), {}
    blocks = [module for module in model.model.vision_tower.modules() if type(module).__name__.endswith("EncoderLayer")]
    attn = blocks[layer_of(model, layer)].self_attn
    hooks = [
        getattr(attn, which).register_forward_hook(lambda m, a, out, which=which: made.__setitem__(which, out))
        for which in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model.model.vision_tower(pixels)
    for hook in hooks:
        hook.remove()
    return made["q_proj"], made["k_proj"]


def outputs_of(name, pixels, layer):
    """What a tower's block gives its patches, `[crops, N, C]`."""
    model, given = shared(name), []
    blocks = [module for module in model.model.vision_tower.modules() if type(module).__name__.endswith("EncoderLayer")]
    hook = blocks[layer_of(model, layer)].register_forward_hook(lambda m, a, out: given.append(out))
    with torch.no_grad():
        model.model.vision_tower(pixels)
    hook.remove()
    whole = given[0][0] if isinstance(given[0], tuple) else given[0]
    return whole[:, whole.shape[1] - EDGE * EDGE :]


def placed(picture, shot, channels):
    """Channels of crops or frames, `[crops, c, N]`, at the tokens of a picture or clip, `[c, n]`."""
    if picture.shot.video:
        pooled = halved(channels.unflatten(-1, (EDGE, EDGE))).flatten(2)
        whole = pooled.transpose(0, 1).flatten(1)
        return torch.cat([whole, whole.new_zeros(len(whole), 1)], 1)
    return canvas_by_hand(channels, shot)
