"""Signals of towers that pack all pictures in one row: at the tokens that each square of patches becomes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.patches import packed_means
from vlmtok.adapters.towers.packed_spec import packed_spec

import vlmtok
from vlmtok.errors import CacheError
from vlmtok.lab.tiny.shots import PATCH_VALUES, packed, packed_clip, rows_with_breaks

from .build import FAMILIES, Family, shared
from .heard import NAMES, ListenToTokens, assert_heard, columns_of
from .packed_by_hand import PACKED, depth_of, encode, members_of, of_shot
from .prompts import Batch
from .shots import PATCH
from .test_token_signals import Listen

BATCHES = [
    (name, which) for name in PACKED for which in ("rows", "several", *(["clips"] if FAMILIES[name].clips else []))
]


def large(name: str) -> Family:
    """The family with pictures that no window divides: 9 x 11 and 5 x 3 tokens, and a clip of such frames."""
    family, layout = FAMILIES[name], {"qwen2_vl": "run", "qwen2_5_vl": "run", "glm4v": "glm", "glm46v": "glm"}
    if name == "mistral3":
        return replace(family, shots={"I": rows_with_breaks(3, 4), "J": rows_with_breaks(4, 1)})
    patch = (3, PATCH, PATCH) if name == "paddleocr_vl" else (PATCH_VALUES,)
    shots = {"I": packed(9, 11, *patch), "J": packed(5, 3, *patch)}
    clips = {"V": packed_clip(2, 3, 5, layout.get(name, "stamped"))} if family.clips else {}
    return replace(family, shots=shots | clips)


def pictures_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Features of every prompt with pictures, in the order of its columns, encoded in one call as hosts do."""
    parts: dict[int, Tensor] = {}
    for video in (False, True):
        shown = [(i, p) for i, prompt in enumerate(batch.prompts) for p in prompt.pictures if p.shot.video == video]
        if shown:
            keys = shown[0][1].shot.arrays
            made = encode(model, {key: torch.cat([p.shot.arrays[key] for _, p in shown]) for key in keys})
            for (_, picture), tokens in zip(shown, made.split([len(p.columns) for _, p in shown]), strict=True):
                parts[id(picture)] = tokens
    return [torch.cat([parts[id(p)] for p in one.pictures])[columns_of(one)] for one in batch.prompts if one.pictures]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_token_is_made_of_the_patches_of_its_square(name: str, size: str) -> None:
    """Of which patches the gradients of every token of several pictures speak, windows and frames included."""
    family, model = FAMILIES[name] if size == "small" else large(name), shared(name, "eager")
    tower = model.model.get_submodule(ROWS[name].tower)
    form = packed_spec(tower, model.config).packed
    for pattern in ("1I1J1", "1V1J1" if "V" in family.shots else "J"):
        for video in (False, True):
            shots = [p.shot for p in family.prompt(pattern).pictures if p.shot.video == video]
            if not shots:
                continue
            arrays = {key: torch.cat([shot.arrays[key] for shot in shots]) for key in shots[0].arrays}
            mine = members_of(name, arrays)
            assert (mine.sum(1) == form.merge**2).all() and (mine.sum(0) == 1).all()
            told = next(value for key, value in arrays.items() if not key.startswith("pixel"))
            order = None if form.windows is None else form.windows(told)[0]
            single = torch.eye(mine.shape[1])[None]
            made = packed_means(ROWS[name].patches, single, 1, form.grids(told), form.merge, order)
            assert torch.equal(made > 0, mine)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "which"), BATCHES)
def test_signals_equal_the_hosts_own_attention(name: str, which: str, kind: str) -> None:
    """Every layer; pictures of several sizes, clips, and rows without either, each as if its pictures came alone."""
    family, layers = FAMILIES[name], tuple(range(depth_of(name)))
    batch = family.batch(*getattr(family, which))
    listen = Listen(NAMES, layers)
    with torch.no_grad(), vlmtok.compress(shared(name, kind), listen):
        shared(name, kind)(**batch.inputs())
    assert_heard(partial(of_shot, name), batch.prompts, listen.heard, layers)


@pytest.mark.parametrize("name", PACKED)
def test_signals_of_pictures_that_no_window_divides(name: str) -> None:
    """Borders of pictures cut windows short; layers with windows and without."""
    family, layers = large(name), tuple(range(depth_of(name)))
    alone = name.startswith("glm")  # its frames have the placeholders of pictures
    clips = [("2V3", "1V2")] if alone else [("2J1V3", "2V3")]
    for patterns in [("2I1J3", "4J3"), *(clips if family.clips else [])]:
        batch = family.batch(*patterns)
        listen = Listen(NAMES, layers)
        with torch.no_grad(), vlmtok.compress(shared(name), listen):
            shared(name)(**batch.inputs())
        assert_heard(partial(of_shot, name), batch.prompts, listen.heard, layers)


@pytest.mark.parametrize("options", [{"num_beams": 3, "output_logits": False}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize(("name", "which"), BATCHES)
def test_every_row_has_its_own(name: str, which: str, options: dict) -> None:
    """Beams and steps without a cache show pictures again: tokens are the encoder's, signals their pictures' own."""
    family, model = FAMILIES[name], shared(name)
    patterns = getattr(family, which)
    if name.startswith("glm") and which != "rows" and "num_beams" in options:
        patterns = family.rows  # GLM gives beams of several pictures or frames those of others: see below
    batch = family.batch(*patterns)
    listen = ListenToTokens(("received_attention", "turned_keys"))
    with vlmtok.compress(model, listen):
        model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False, **options)
    times = options.get("num_beams", 2)
    assert_heard(partial(of_shot, name), batch.prompts, listen.heard, times=times)
    with torch.no_grad():
        known = pictures_of(model, batch)
    for _, found in listen.heard:
        assert sum(torch.equal(found["tokens"], one) for one in known) == 1


@pytest.mark.parametrize(("pattern", "said"), [("2I3J5", "GLM, with several"), ("2I3I5", "GLM-4.1V.*use one beam")])
@pytest.mark.parametrize("name", ["glm4v", "glm46v"])
def test_beams_that_the_host_gives_other_pictures_are_refused(name: str, pattern: str, said: str) -> None:
    """GLM repeats features picture by picture, so that rows of several pictures hold those of others."""
    family, model = FAMILIES[name], shared(name)
    inputs = family.batch(pattern, "4J3").inputs()
    with vlmtok.compress(model, "visionzip:keep=0.5"):
        with pytest.raises(CacheError, match=said):
            model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", PACKED)
def test_pictures_of_another_call_are_refused(name: str) -> None:
    """Features of an earlier call belong to another pass of the tower."""
    family, model = FAMILIES[name], shared(name)
    first, second = (family.collect(family.prompt("2J3", seed)).inputs() for seed in (1, 2))
    arrays = [
        {k: v for k, v in one.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")}
        for one in (first, second)
    ]
    given = {key: value for key, value in first.items() if key != "pixel_values"}
    with vlmtok.compress(model, "visionzip:keep=0.5"), torch.no_grad():
        old = model.model.get_image_features(**arrays[0], return_dict=True)
        model(**given, mm_encoder_outputs={"image": old})
        model.model.get_image_features(**arrays[1], return_dict=True)
        with pytest.raises(CacheError, match="encode and ask in one call"):
            model(**given, mm_encoder_outputs={"image": old})


@pytest.mark.parametrize("name", PACKED)
def test_a_prefill_in_chunks_is_refused(name: str) -> None:
    """A chunk that holds a part of a picture cannot be cut."""
    family, model = FAMILIES[name], shared(name)
    with vlmtok.compress(model, "visionzip:keep=0.5"), pytest.raises(CacheError, match="chunk"):
        model.generate(**family.batch("2I3").inputs(), max_new_tokens=1, do_sample=False, prefill_chunk_size=7)
