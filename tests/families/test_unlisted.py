"""Families that are not listed, carried by `generic-vlm` or refused by name of what is missing; and the refused."""

import dataclasses

import pytest
import torch
import transformers as tf

import vlmtok
from vlmtok.errors import UnsupportedModel, VlmtokError
from vlmtok.lab.tiny.models_1d import llava

from .build import FAMILIES, Family, shared
from .harness import BY_SAMPLE, GAP, MODES, Expected, batch, expected, generate
from .methods import Top
from .oracle import Oracle
from .shots import plain
from .unlisted import TaggedForConditionalGeneration, novel

NOVEL = Family("novel", novel, {"I": plain(), "J": plain()})
STANDARD = [
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "smolvlm",
    "idefics3",
    "llama4",
    "aya_vision",
    "lfm2_vl",
    "qwen2_5_vl",
]
"""Listed families whose call is the standard one."""


def said(model, rows, cuts):
    """What the oracle says to a batch of the unlisted family."""
    asked = Oracle(model)
    found = [asked.generate(prompt, cuts) for prompt in rows.prompts]
    assert asked.gap > GAP
    return Expected(*(torch.stack(parts) for parts in zip(*found)))


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("mode", MODES)
def test_an_unlisted_family(mode, cached):
    cuts, rows, model = MODES[mode], NOVEL.batch("3I6", "2J4"), NOVEL.build()
    wanted = said(model, rows, cuts)
    if cuts:
        with vlmtok.compress(model, [Top(cut) for cut in cuts], adapter="generic-vlm"):
            found = generate(model, rows.inputs(), use_cache=cached)
    else:
        found = generate(model, rows.inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize("mode", ["boundary", "both+half"])
@pytest.mark.parametrize("name", STANDARD)
def test_a_listed_family_as_if_it_were_not(name, mode):
    cuts, model = BY_SAMPLE[mode], shared(name)
    with vlmtok.compress(model, [Top(cut) for cut in cuts], adapter="generic-vlm"):
        found = generate(model, batch(name, "several").inputs())
    expected(name, cuts, "several").check(*found)


class CopiedConfig(tf.LlavaConfig):
    model_type = "llava_copied"


class CopiedForConditionalGeneration(tf.LlavaForConditionalGeneration):
    config_class = CopiedConfig


def copied():
    """LLaVA under other names."""
    given = llava().config.to_dict()
    return CopiedForConditionalGeneration(CopiedConfig(**{k: v for k, v in given.items() if k != "model_type"}))


def test_a_copy_of_a_family_under_another_name():
    """Its model type has no row: refused with a hint, and carried where that is asked for."""
    family = dataclasses.replace(FAMILIES["llava"], make=copied)
    model, rows, cuts = family.build(), family.batch("3I6", "2J4"), MODES["both+half"]
    assert model.config.model_type == "llava_copied"
    with pytest.raises(UnsupportedModel, match="generic-vlm"):
        vlmtok.compress(model, Top())
    wanted = said(model, rows, cuts)
    with vlmtok.compress(model, [Top(cut) for cut in cuts], adapter="generic-vlm"):
        found = generate(model, rows.inputs())
    wanted.check(*found)


def test_it_must_be_asked_for():
    """Nobody is carried by a guess; the error says how to try."""
    with pytest.raises(UnsupportedModel, match="generic-vlm"):
        vlmtok.compress(NOVEL.build(), Top())


@pytest.mark.filterwarnings("ignore:the hooks of top never ran")
def test_an_unknown_tensor_of_each_token_is_named():
    model = dataclasses.replace(NOVEL, make=lambda: novel(TaggedForConditionalGeneration)).build()
    rows = NOVEL.batch("3I6", "2J4")
    bare = generate(model, rows.inputs(), 1)
    with vlmtok.compress(model, Top(), adapter="generic-vlm"), pytest.raises(VlmtokError, match="token_tags"):
        generate(model, rows.inputs(), 1)
    assert torch.equal(generate(model, rows.inputs(), 1)[1], bare[1])


def test_a_text_model_by_another_name_is_asked_for():
    model = NOVEL.build()
    model.model.speaker = model.model.language_model
    del model.model.language_model
    with pytest.raises(UnsupportedModel, match="language_model"):
        vlmtok.compress(model, Top(), adapter="generic-vlm")


def test_a_config_without_a_placeholder_is_asked_for():
    model = NOVEL.build()
    del model.config.image_token_id
    with pytest.raises(UnsupportedModel, match="image_token_id"):
        vlmtok.compress(model, Top(), adapter="generic-vlm")


def test_a_model_of_text_alone_is_refused():
    with pytest.raises(UnsupportedModel):
        vlmtok.compress(NOVEL.build().model.language_model, Top(), adapter="generic-vlm")
