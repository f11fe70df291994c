"""Cuts that stand on each other, by picture, part and sample, kept and renumbered: equal to the oracle."""

import pytest
import torch
from support.hosts_of import cache_of, with_cache

from .build import FAMILIES
from .harness import LAYER, ask, batch, generate
from .methods import compressed
from .oracle import Cut
from .test_dialogue import Turns, model_of

PARTED = ("llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "mistral3")
"""Canvases of crops, crops and a thumbnail, clips, and one of which all pictures are whole."""

STACKS: dict[str, tuple[Cut, ...]] = {
    "part, then picture": (Cut(0.6, scope="part"), Cut(0.6)),
    "picture, then part": (Cut(0.6), Cut(0.6, scope="part")),
    "part, then inside by sample": (Cut(0.6, scope="part"), Cut(0.6, 1, scope="sample"), Cut(0.5, 3)),
    "parts inside": (Cut(0.6, 1, scope="part"), Cut(0.7, LAYER, scope="sample"), Cut(0.7, 3, scope="part")),
    "merged, parts, picture": (Cut(None), Cut(0.6, 1, scope="part"), Cut(0.6, 3)),
}
RENUMBERED: dict[str, tuple[Cut, ...]] = {
    "twice": (Cut(0.7, 1, positions="renumber"), Cut(0.6, 3, positions="renumber")),
    "kept between": (Cut(0.8, positions="renumber"), Cut(0.7, 1), Cut(0.7, 3, positions="renumber")),
    "parts, kept first": (Cut(0.7, scope="part"), Cut(0.6, LAYER, scope="part", positions="renumber")),
}


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", PARTED)
def test_stacks_equal_the_oracle(name, stack, cached):
    """Rows with two pictures, some of them cut into crops, one picture, and none."""
    cuts = STACKS[stack]
    rows, model = batch(name, "several"), model_of(name)
    wanted = ask(name, rows.prompts, cuts)
    with compressed(model, cuts):
        found = generate(model, rows.inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", [name for name in PARTED if FAMILIES[name].clips])
def test_stacks_on_clips(name, stack):
    cuts, rows = STACKS[stack], batch(name, "clips")
    wanted = ask(name, rows.prompts, cuts)
    with compressed(model_of(name), cuts):
        wanted.check(*generate(model_of(name), rows.inputs()))


@pytest.mark.parametrize("stack", RENUMBERED)
@pytest.mark.parametrize("name", ["llava_next", "internvl", "gemma3", "mistral3"])
def test_a_second_turn_with_a_picture_behind_renumbering_cuts(name, stack):
    """Two renumbering cuts in each turn: positions go on where each segment of layers counts."""
    cuts = RENUMBERED[stack]
    turns, model = Turns(name, cuts), model_of(name)
    with compressed(model, cuts):
        out = model.generate(
            **turns.first.inputs(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, use_cache=True
        )
        assert torch.equal(out.sequences[:, -4:], turns.written)
        turns.wanted.check(*generate(model, turns.second(), **with_cache(model, cache_of(out))))
