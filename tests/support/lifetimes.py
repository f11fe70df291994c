"""One model of each way in which hooks are placed, its method, and an exception of our own."""

from __future__ import annotations

import torch

import vlmtok

# One model of each way in which hooks are placed: timm, rotary, MHA, transformers, a language model.
EVERY = ["timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIP vision", "HF SiglipModel", "HF LLaVA"]
SPEC = {"HF LLaVA": "pitome:ratio=0.8+todre:keep=0.5:tau=0.9"}


def spec_of(name):
    return SPEC.get(name, "tome:r=6")


def methods_of(name):
    return vlmtok.parse_methods(spec_of(name))


def outputs(subject):
    with torch.no_grad():
        return subject.out()


class Boom(RuntimeError):
    pass


def blocks_of(model):
    """Blocks of the vision tower, and of a language model behind it."""
    tower = getattr(model, "visual", getattr(model, "vision_model", model))
    return [m for m in tower.modules() if type(m).__name__ in BLOCKS]


BLOCKS = (
    "Block",
    "EvaBlock",
    "ResidualAttentionBlock",
    "CLIPEncoderLayer",
    "SiglipEncoderLayer",
    "LlamaDecoderLayer",
)
