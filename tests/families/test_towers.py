"""Cuts inside the vision tower: where the tokens left can reach the language model, and where they cannot.

The reference is the host itself with its layer's output shortened by hand.
"""

import contextlib

import pytest
import torch
from torch import nn
from vlmtok.adapters.language.families import ROWS

import vlmtok
from vlmtok.errors import SiteError, VlmtokError

from .build import FAMILIES, TOWER_ONLY, shared
from .harness import Expected, ask, batch, generate
from .methods import InTower, Top
from .oracle import Cut, chosen
from .prompts import Picture, Prompt

SLOTS = {"llava": 1, "paligemma": 0, "paligemma2": 0, "deepseek_vl": 0, "janus": 0}
"""What is left takes a picture's first placeholders; by family, tokens in front of the patches."""
SPREAD = {
    "llava_next": 1,
    "llava_next_video": 1,
    "llava_onevision": 0,
    "internvl": 1,
    "qianfan_ocr": 1,
    "smolvlm": 0,
    "idefics3": 0,
    "gemma3": 0,
    "aya_vision": 0,
    "cohere2_vision": 0,
}
"""What is left is spread over the grid again behind the tower's last layer."""
WHOLE = sorted(name for name in FAMILIES if name in ROWS and ROWS[name].tower_cut is None)
"""The tower pads rows of pictures, or pools by place: no token can leave."""
LAST = {"llava": 1, "llava_next": 1, "llava_next_video": 1}
"""The last layer whose output is used, where that is not the last one."""


def tower_of(model):
    """The tower's layers."""
    inner = getattr(model, "model", model)
    tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model
    return next(part for part in tower.modules() if isinstance(part, nn.ModuleList))


@contextlib.contextmanager
def by_hand(model, prefix, merge, last=None):
    """The model with its patches halved behind the first layer, and spread again behind layer `last`."""
    layers = tower_of(model)

    def halve(layer, given, out):
        fixed, patches = out[:, :prefix], out[:, prefix:]
        if merge:
            left = (patches[:, ::2] + patches[:, 1::2]) / 2
        else:
            left = torch.stack([row[chosen(row, 0.5)[0]] for row in patches])
        return torch.cat([fixed, left], 1)

    def spread(layer, given, out):
        return torch.cat([out[:, :prefix], out[:, prefix:].repeat_interleave(2, 1)], 1)

    hooks = [layers[0].register_forward_hook(halve, prepend=True)]
    if last is not None:
        hooks.append(layers[last].register_forward_hook(spread, prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def halved(prompt):
    """A prompt whose pictures take half the placeholders."""
    stays = torch.ones_like(prompt.ids, dtype=torch.bool)
    for picture in prompt.pictures:
        stays[picture.columns[len(picture.columns) // 2 :]] = False
    column = stays.long().cumsum(0) - 1
    left = [Picture(column[p.columns[: len(p.columns) // 2]], p.shot) for p in prompt.pictures]
    return Prompt(prompt.ids[stays], tuple(left))


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("merge", [True, False], ids=["merge", "prune"])
@pytest.mark.parametrize("name", SLOTS)
def test_slots_fill_the_first_placeholders(name, merge, cached):
    with by_hand(shared(name, "eager"), SLOTS[name], merge):
        wanted = ask(name, tuple(map(halved, batch(name).prompts)), ())
    model = shared(name, FAMILIES[name].attentions[0])
    with vlmtok.compress(model, InTower(merge)):
        found = generate(model, batch(name).inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize("name", SLOTS)
def test_cuts_behind_a_cut_tower(name):
    cut = Cut(0.5, 2)
    with by_hand(shared(name, "eager"), SLOTS[name], False):
        wanted = ask(name, tuple(map(halved, batch(name).prompts)), (cut,))
    model = shared(name, FAMILIES[name].attentions[0])
    with vlmtok.compress(model, [InTower(), Top(cut)]):
        found = generate(model, batch(name).inputs())
    wanted.check(*found)


@pytest.mark.parametrize("which", ["rows", "several"])
@pytest.mark.parametrize("name", SPREAD)
def test_merged_patches_are_spread_over_the_grid(name, which):
    model = shared(name, FAMILIES[name].attentions[0])
    last = LAST.get(name, len(tower_of(model)) - 1)
    with by_hand(shared(name, "eager"), SPREAD[name], True, last):
        wanted = ask(name, batch(name, which).prompts, ())
    with vlmtok.compress(model, InTower(True)):
        found = generate(model, batch(name, which).inputs())
    wanted.check(*found)


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "prune"])
@pytest.mark.parametrize("name", TOWER_ONLY)
def test_queries_read_what_is_left(name, merge):
    family = TOWER_ONLY[name]
    model, inputs = shared(name), family.batch(*family.rows).inputs()
    bare = Expected(*generate(model, inputs))
    with by_hand(model, 1, merge):
        wanted = Expected(*generate(model, inputs))
    assert (wanted.logits[:, 0] - bare.logits[:, 0]).abs().max() > 1e-2
    with vlmtok.compress(model, InTower(merge)):
        found = generate(model, inputs)
    wanted.check(*found)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("name", TOWER_ONLY)
def test_no_cut_where_embeddings_come_without_ids(name, layer):
    with pytest.raises(SiteError, match="embeddings"):
        vlmtok.compress(shared(name), Top(Cut(0.5, layer)))


@pytest.mark.parametrize("name", WHOLE)
def test_towers_whose_tokens_cannot_leave(name):
    with pytest.raises(VlmtokError, match="vision"):
        vlmtok.compress(shared(name), InTower())
