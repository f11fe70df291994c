"""Crops on a canvas that was cut to the picture: each has a grid of its own, by which average pooling works."""

import dataclasses

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

import vlmtok
from vlmtok import AveragePool
from vlmtok.errors import ParameterError
from vlmtok.lab.tiny.shots import AnyRes

from .build import FAMILIES, shared
from .methods import Look
from .oracle import oracle
from .prompts import Batch
from .test_spans import pushed_through

NAMES = ("llava_next", "llava_onevision")
SIZES = {
    "cut above and below": (40, 60, (64, 64)),
    "one row of crops": (30, 62, (32, 64)),
    "cut left and right": (64, 40, (64, 64)),
    "narrow strips": (64, 12, (64, 32)),
    "flat strips": (11, 64, (32, 64)),
    "whole": (64, 64, (64, 64)),
}


def batch_of(name, *sizes):
    shots = {letter: AnyRes(*SIZES[size]) for letter, size in zip("IJ", sizes)}
    family = dataclasses.replace(FAMILIES[name], shots=shots)
    return Batch(tuple(family.prompt(pattern, row) for row, pattern in enumerate(("2I3", "4J2")[: len(sizes)])))


def fields_of(name, picture):
    """Of each part, the places of its tokens in the picture, int64 `[rows, columns]`, by the host's own packing."""
    numbers = pushed_through(shared(name), picture.shot)
    line = (numbers < 0).cumsum(0)
    found = {}
    for part in numbers[numbers >= 0].unique().tolist():
        at = (numbers == part).nonzero()[:, 0]
        side = shared(name).model.config.vision_config.image_size // shared(name).model.config.vision_config.patch_size
        rows = side if part == 0 else len(line[at].unique())
        found[part] = at.view(rows, -1)
    return found


def inputs_of_layers(model, batch):
    """What the first layer of the language model gets, `[B, L, C]`."""
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch.inputs())
    hook.remove()
    return seen[0]


def pooled(row, picture, fields, halves):
    """A prompt's embeddings `[L, C]` with every part pooled, a window at the place of its first token."""
    start = int(picture.columns[0])
    gone = set(picture.columns[torch.cat([at.flatten() for at in fields.values()])].tolist())
    found = [(place, row[place]) for place in range(len(row)) if place not in gone]
    for at in fields.values():
        rows, columns = at.shape
        size = halves(rows), halves(columns)
        means = adaptive_avg_pool2d(row[start + at].permute(2, 0, 1)[None], size)[0].flatten(1).T
        firsts = [int(at[i * rows // size[0], j * columns // size[1]]) for i in range(size[0]) for j in range(size[1])]
        found += zip([start + first for first in firsts], means)
    return torch.stack([token for _, token in sorted(found, key=lambda one: one[0])])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_crop_has_its_own_grid(name, size):
    model, look, batch = shared(name), Look("part"), batch_of(name, size)
    with vlmtok.compress(model, look):
        inputs_of_layers(model, batch)
    (picture,) = batch.prompts[0].pictures
    fields = fields_of(name, picture)
    assert {int(one.part[0]): one.grid for one in look.seen} == {part: tuple(at.shape) for part, at in fields.items()}
    for one in look.seen:
        assert torch.equal(one.columns - picture.columns[0], fields[int(one.part[0])].flatten())


@pytest.mark.parametrize("sizes", [*((size,) for size in SIZES), ("cut above and below", "narrow strips")])
@pytest.mark.parametrize("name", NAMES)
def test_average_pooling_equals_torch_in_every_crop(name, sizes):
    model, batch = shared(name), batch_of(name, *sizes)
    with vlmtok.compress(model, AveragePool(overlap=True)):
        found = inputs_of_layers(model, batch)
    asked = oracle(name, shared(name, "eager"))
    lengths = []
    for row, prompt in zip(found, batch.prompts):
        bare = asked.row(prompt, prompt.ids[:0], asked.encode(prompt)).hidden
        (picture,) = prompt.pictures
        wanted = pooled(bare, picture, fields_of(name, picture), lambda side: (side + 1) // 2)
        assert torch.allclose(row[-len(wanted) :], wanted, atol=1e-4)
        assert len(wanted) < len(bare)
        lengths.append(len(wanted))
    assert found.shape[1] == max(lengths)


@pytest.mark.parametrize("name", NAMES)
def test_a_crop_that_cannot_be_halved_is_refused_with_the_cure(name):
    model, batch = shared(name), batch_of(name, "cut above and below")
    with vlmtok.compress(model, AveragePool()), pytest.raises(ParameterError, match="3 x 4 .* or overlap=True"):
        inputs_of_layers(model, batch)
