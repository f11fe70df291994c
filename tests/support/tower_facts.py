"""Towers that ran once with hooks of torch alone looking on: what facts of towers are asked of."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vlmtok.adapters.base import BlockSpec, child
from vlmtok.adapters.towers import hf_rows, open_clip_vit, timm_vit

from . import models
from .facts import Call, calls_of, one

SPECS: dict[str, BlockSpec] = {
    "timm ViT": timm_vit.VIT_BLOCK,
    "timm DeiT-3": timm_vit.VIT_BLOCK,
    "timm DINOv2 registers": timm_vit.VIT_BLOCK,
    "timm SigLIP": timm_vit.VIT_BLOCK,
    "timm EVA": timm_vit.EVA_BLOCK,
    "timm EVA-02": timm_vit.EVA_BLOCK,
    "timm PE": timm_vit.EVA_BLOCK,
    "timm DINOv3": timm_vit.EVA_BLOCK,
    "open_clip CLIP": open_clip_vit.MHA_BLOCK,
    "open_clip CustomTextCLIP": open_clip_vit.MHA_BLOCK,
    "open_clip CoCa": open_clip_vit.MHA_BLOCK,
    "HF CLIP vision": hf_rows.CLIP_BLOCK,
    "HF CLIP vision eager": hf_rows.CLIP_BLOCK,
    "HF SigLIP vision": hf_rows.CLIP_BLOCK,
    "HF ViT": hf_rows.VIT_BLOCK,
    "HF DINOv2": hf_rows.DINOV2_BLOCK,
}
"""Rows that the surgery of `towers.tower` is driven by, and a model for each."""
EVA = [name for name in SPECS if SPECS[name].rope]
TIMM = [name for name in SPECS if name.startswith("timm")]
OPEN_CLIP = [name for name in SPECS if name.startswith("open_clip")]
HF = [name for name in SPECS if name.startswith("HF")]


@dataclass
class Host:
    """A tower that ran once.

    Attributes:
        blocks: paths of its blocks, in order.
        calls: of all its modules.
    """

    name: str
    model: nn.Module
    spec: BlockSpec
    blocks: list[str]
    pictures: Tensor
    calls: list[Call] = field(default_factory=list)

    def path(self, block: int, *parts: str) -> str:
        return ".".join((self.blocks[block], *(part for part in parts if part)))

    def call(self, block: int, *parts: str) -> Call:
        return one(self.calls, self.path(block, *parts))

    def module(self, block: int, *parts: str) -> nn.Module:
        return child(self.model, self.path(block, *parts))

    def row(self, block: int) -> Tensor:
        """What a block got."""
        return self.call(block).args[0]

    def again(self) -> Tensor:
        with torch.no_grad():
            return models.TOWERS[self.name].run(self.model, self.pictures)


LAYERS = {"Block", "EvaBlock", "ResidualAttentionBlock", *(row.layer for row in hf_rows.ROWS.values())}


@functools.cache
def host(name: str) -> Host:
    model, tower = models.fresh(name), models.TOWERS[name]
    root = "visual." if name.startswith("open_clip") else ""
    blocks = [p for p, m in model.named_modules() if type(m).__name__ in LAYERS and p.startswith(root)]
    if name.endswith("CoCa"):
        blocks = [path for path in blocks if path.startswith("visual.transformer")]
    found = Host(name, model, SPECS[name], blocks, tower.pictures(2))
    found.calls, _ = calls_of(model, found.again)
    return found


def heads_of(at: Host, which: str) -> Tensor:
    """q or k of block 1, [B, H, L, d], caught where the row says, or else computed again."""
    attn, name = at.module(1, at.spec.attn), getattr(at.spec, which)
    if name is None:
        return at.spec.project(attn, at.call(1, at.spec.norm).output, which, {})
    out = at.call(1, at.spec.attn, name).output
    return out if out.dim() == 4 else out.unflatten(-1, (models.HEADS, -1)).transpose(1, 2)


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
