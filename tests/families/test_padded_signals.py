"""Signals of towers whose rows are padded, or end in a class token: at the tokens that their patches become."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.checks import assert_equal
from torch import Tensor, nn
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.patches import packed_means
from vlmtok.adapters.towers.packed_spec import packed_spec

import vlmtok
from vlmtok.errors import CacheError, HostChanged, PassError, SiteError
from vlmtok.lab.tiny.shots import naflex, pooled_patches

from .build import FAMILIES, Family, shared
from .harness import generate
from .heard import NAMES, ListenToTokens, assert_heard, columns_of
from .padded_by_hand import CLASSED, PADDED, core_of, depth_of, encode, members_of, of_shot, patches_of
from .prompts import Batch, Prompt
from .test_token_signals import Listen

BATCHES = [
    (name, which) for name in PADDED for which in ("rows", "several", *(["clips"] if FAMILIES[name].clips else []))
]


def names_of(name: str) -> tuple[str, ...]:
    """Signals that a family's tower gives at tokens."""
    return (*NAMES, "cls_attention") if name in CLASSED else NAMES


def wide(name: str) -> Family:
    """The family with pictures of which an order of rows and columns shows."""
    family = FAMILIES[name]
    if name == "lfm2_vl":
        return replace(family, shots={"I": naflex([(5, 3)], False), "J": naflex([(1, 7), (4, 2)], True)})
    if name == "gemma4":
        return replace(family, shots={**family.shots, "I": pooled_patches(5, 3), "J": pooled_patches(1, 7)})
    return family


def joined(batch: Batch | Prompt, video: bool) -> dict[str, Tensor]:
    """Arguments of all pictures, or of all clips, in order."""
    prompts = batch.prompts if isinstance(batch, Batch) else (batch,)
    shots = [p.shot for prompt in prompts for p in prompt.pictures if p.shot.video == video]
    return {key: torch.cat([shot.arrays[key] for shot in shots]) for key in (shots[0].arrays if shots else ())}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("size", ["small", "wide"])
def test_a_token_is_made_of_the_patches_of_its_square(name: str, size: str) -> None:
    """Of which patches the gradients of every token of several pictures speak, and of no padding."""
    family, model = FAMILIES[name] if size == "small" else wide(name), shared(name, "eager")
    form = packed_spec(core_of(name, model).get_submodule(ROWS[name].tower), model.config).packed
    prompt = family.prompt("1I1J1V1" if "V" in family.shots else "1I1J1")
    for video in (False, True):
        arrays = joined(prompt, video)
        if not arrays:
            continue
        mine = members_of(name, arrays)
        told = next(
            (v for key, v in arrays.items() if key.endswith(("shapes", "position_ids"))), arrays.get("pixel_values")
        )
        grids = form.grids(told)
        length = mine.shape[1] // len(grids)
        counts = patches_of(name, arrays, length)
        real = torch.cat([torch.arange(n) + length * row for row, n in enumerate(counts)])
        assert (mine.sum(1) == form.merge**2).all() and torch.equal(mine.any(0).nonzero()[:, 0], real)
        if form.by_token is not None:
            real = torch.cat([within + length * row for row, within in enumerate(form.by_token(told, grids))])
        made = packed_means(ROWS[name].patches, torch.eye(mine.shape[1])[None], 1, grids, form.merge, None, real)
        assert torch.equal(made > 0, mine)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "which"), BATCHES)
def test_signals_equal_the_hosts_own_attention(name: str, which: str, kind: str) -> None:
    """Every layer; pictures of several sizes, clips, and rows without either, each as if its pictures came alone."""
    family, layers = FAMILIES[name], tuple(range(depth_of(name)))
    batch = family.batch(*getattr(family, which))
    listen = Listen(names_of(name), layers)
    falls = (AttributeError,) if name == "llama4" else ()  # over its own output in 5.24.0, when all is done
    with torch.no_grad(), vlmtok.compress(shared(name, kind), listen), contextlib.suppress(*falls):
        shared(name, kind)(**batch.inputs())
    assert_heard(partial(of_shot, name), batch.prompts, listen.heard, layers)


@pytest.mark.parametrize("name", [name for name in PADDED if name != "llama4"])
def test_signals_of_pictures_of_any_form(name: str) -> None:
    """Rows and columns of different numbers."""
    family, layers = wide(name), tuple(range(depth_of(name)))
    prompts = [family.prompt(pattern, 1) for pattern in ("2I1J3", "4J3")]
    listen = Listen(NAMES, layers)
    with torch.no_grad(), vlmtok.compress(shared(name), listen):
        shared(name)(**family.collect(*prompts).inputs())
    assert_heard(partial(of_shot, name), prompts, listen.heard, layers)


@pytest.mark.parametrize(
    ("name", "which", "options"),
    [(*case, {"use_cache": False}) for case in BATCHES]
    + [(*case, {"num_beams": 3, "output_logits": False}) for case in BATCHES if FAMILIES[case[0]].beams],
    ids=str,
)
def test_every_row_has_its_own(name: str, which: str, options: dict) -> None:
    """Beams and steps without a cache show pictures again: tokens are the encoder's, signals their pictures'."""
    family, model = FAMILIES[name], shared(name)
    batch = family.batch(*getattr(family, which))
    listen = ListenToTokens(("received_attention", "turned_keys"))
    with vlmtok.compress(model, listen):
        model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False, **options)
    assert_heard(partial(of_shot, name), batch.prompts, listen.heard, times=options.get("num_beams", 2))
    with torch.no_grad():
        known = tokens_of(name, model, batch)
    for _, found in listen.heard:
        assert sum(torch.equal(found["tokens"], one) for one in known) == 1


def tokens_of(name: str, model: nn.Module, batch: Batch) -> list[Tensor]:
    """Tokens of every prompt with pictures, in the order of its columns, encoded in one call as hosts do."""
    parts: dict[int, Tensor] = {}
    for video in (False, True):
        shown = [p for prompt in batch.prompts for p in prompt.pictures if p.shot.video == video]
        if shown:
            made = encode(name, model, joined(batch, video)).split([len(p.columns) for p in shown])
            parts.update({id(picture): tokens for picture, tokens in zip(shown, made, strict=True)})
    return [torch.cat([parts[id(p)] for p in one.pictures])[columns_of(one)] for one in batch.prompts if one.pictures]


def test_patches_of_gemma_in_any_order() -> None:
    """Places tell where patches are, so that their order in the row means nothing."""
    family, model = FAMILIES["gemma4"], shared("gemma4")
    inputs = family.batch("2J3").inputs()
    n = int((inputs["image_position_ids"] >= 0).all(-1).sum())
    mixed = torch.cat([torch.randperm(n, generator=torch.Generator().manual_seed(3)), torch.arange(n, 64)])
    heard = []
    for order in (torch.arange(64), mixed):
        listen = Listen(NAMES)
        moved = {key: inputs[key][:, order] for key in ("pixel_values", "image_position_ids")}
        with torch.no_grad(), vlmtok.compress(model, listen):
            model(**{**inputs, **moved})
        heard.append(listen.heard[0][1])
    for need, value in heard[0].items():
        assert_equal(heard[1][need], value, 1e-5)


def test_patches_behind_padding_are_refused() -> None:
    """Rows with padding in front are no rows of these towers."""
    model = shared("gemma4")
    inputs = FAMILIES["gemma4"].batch("2J3").inputs()
    turned = {key: inputs[key].flip(1) for key in ("pixel_values", "image_position_ids")}
    with torch.no_grad(), vlmtok.compress(model, "visionzip:keep=0.5"):
        with pytest.raises(HostChanged, match="missing or behind padding"):
            model(**{**inputs, **turned})
        model(**inputs)


@pytest.mark.parametrize("name", ["lfm2_vl", "gemma4"])
def test_squares_that_do_not_fill_a_picture_are_refused(name: str) -> None:
    """Three rows of five patches are no squares of two by two."""
    model = shared(name)
    places = torch.full((1, 64, 2), -1)
    places[0, :15] = torch.stack([torch.arange(15) % 5, torch.arange(15) // 5], -1)
    given = {
        "lfm2_vl": {
            "spatial_shapes": torch.tensor([[3, 5]]),
            "pixel_attention_mask": (torch.arange(64) < 15).long()[None],
        },
        "gemma4": {"image_position_ids": places},
    }
    with vlmtok.compress(model, "visionzip:keep=0.5"), pytest.raises(PassError, match="3 x 5 patches"):
        model.model.get_image_features(pixel_values=torch.rand(1, 64, 48), **given[name])


def test_a_mask_that_hides_a_patch_is_refused() -> None:
    """Signals would be those of other keys than the tower saw."""
    model = shared("lfm2_vl")
    inputs = FAMILIES["lfm2_vl"].batch("2J3").inputs()
    mask = inputs["pixel_attention_mask"].clone()
    mask[0, 3] = 0
    with torch.no_grad(), vlmtok.compress(model, "visionzip:keep=0.5"):
        for strange in (mask, torch.ones_like(mask)):
            with pytest.raises(HostChanged, match="hide the padding"):
                model(**{**inputs, "pixel_attention_mask": strange})
        model(**inputs)


@pytest.mark.parametrize("name", PADDED)
def test_pictures_of_another_call_are_refused(name: str) -> None:
    """Features of an earlier call belong to another pass of the tower."""
    family, model = FAMILIES[name], shared(name)
    first, second = (family.collect(family.prompt("2J3", seed)) for seed in (1, 2))
    given = {key: value for key, value in first.inputs().items() if key not in joined(first, False)}
    core = core_of(name, model)
    with vlmtok.compress(model, "visionzip:keep=0.5"), torch.no_grad():
        old = core.get_image_features(**joined(first, False), return_dict=True)
        model(**given, mm_encoder_outputs={"image": old})
        core.get_image_features(**joined(second, False), return_dict=True)
        with pytest.raises(CacheError, match="encode and ask in one call"):
            model(**given, mm_encoder_outputs={"image": old})


def test_a_late_projector_wants_what_the_tower_gave_last() -> None:
    """Llama 4 projects in a later call, and again at each step without a cache."""
    family, model = FAMILIES["llama4"], shared("llama4")
    first, second = (joined(family.collect(family.prompt("2J3", seed)), False) for seed in (1, 2))
    with vlmtok.compress(model, "visionzip:keep=0.5"), torch.no_grad():
        old, new = (
            model.get_image_features(**arrays, return_dict=True).last_hidden_state.flatten(0, -2)
            for arrays in (first, second)
        )
        with pytest.raises(CacheError, match="the tower made last"):
            model.multi_modal_projector(old)
        assert torch.equal(model.multi_modal_projector(new), model.multi_modal_projector(new))


@pytest.mark.parametrize("name", PADDED)
def test_no_token_leaves_inside(name: str) -> None:
    """These towers are read and not cut; the reason is said."""
    with pytest.raises(SiteError, match=ROWS[name].whole):
        vlmtok.compress(shared(name), "tome:r=2")


@pytest.mark.parametrize("name", PADDED)
def test_a_picture_is_chosen_from_as_if_alone(name: str) -> None:
    """What stays of a picture does not hang on the others of the call, on their sizes or on padding."""
    family, model = FAMILIES[name], shared(name)
    batch = family.batch(*family.several)
    with vlmtok.compress(model, "visionzip:keep=0.5", trace=True) as run:
        generate(model, batch.inputs(), 1)
        together = [picture.owner for picture in run.trace().pictures]
        alone = []
        for prompt in batch.prompts:
            if prompt.pictures:
                generate(model, family.collect(prompt).inputs(), 1)
                alone += [picture.owner for picture in run.trace().pictures]
    assert len(together) == len(alone) > 1
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
