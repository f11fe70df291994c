"""Towers of odd sizes and depths, and what they say under cuts held against the oracle."""

from __future__ import annotations

import functools

import torch

import vlmtok
from vlmtok.lab.tiny import towers

from . import models, oracle
from .checks import assert_differs, assert_equal
from .player import Player


def odd(name, depth, size, patch=8):
    """A tower of its own depth, patches in a grid of odd sides."""
    model = towers.timm_vit(name, depth=depth, img_size=size, patch_size=patch)
    return models.Tower(f"{name}, {depth} blocks", lambda: model, towers._logits, towers._features, 0, size)


ODD = {
    "ViT 7 x 3": functools.cache(lambda: odd("vit_tiny_patch16_224", 3, (56, 24))),
    "registers 3 x 7": functools.cache(lambda: odd("vit_small_patch14_reg4_dinov2", 5, (24, 56))),
    "EVA-02 5 x 3": functools.cache(lambda: odd("eva02_base_patch14_224", 3, (40, 24))),
    "SigLIP 3 x 5": functools.cache(lambda: odd("vit_base_patch16_siglip_224", 3, (24, 40))),
}


@functools.cache
def tower_of(name):
    tower = ODD[name]() if name in ODD else models.TOWERS[name]
    return tower, tower.build()


def noise(tower, count, seed):
    """Pictures of any size; `models.pictures` wants multiples of 16."""
    return torch.randn(count, 3, *tower.size, generator=torch.Generator().manual_seed(seed))


def assert_tower_equals_the_oracle(name, spec, seed):
    tower, model = tower_of(name)
    pictures, methods = noise(tower, 3, seed), vlmtok.parse_methods(spec) if isinstance(spec, str) else spec
    with torch.no_grad():
        with vlmtok.compress(model, methods) as run:
            head, tokens = tower.run(model, pictures), tower.tokens(model, pictures)
            memory = {at: run.memory(at) for at in range(len(methods))}
        vision = oracle.vision_of(model)
        for i in range(len(pictures)):
            seen = oracle.run_tower(vision, pictures[i : i + 1], Player(methods, run.layout, memory))
            wanted = vision.tokens(seen.x[None])
            assert_equal(tokens[i : i + 1], wanted, what=f"tokens of picture {i}")
            assert_equal(head[i : i + 1], vision.answer(wanted, seen.size), what=f"output of picture {i}")
        assert_differs(head, tower.run(model, pictures))
