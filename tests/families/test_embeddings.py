"""Prompts given as embeddings in which pictures are merged already: nothing can be cut, and a warning says so."""

import warnings

import pytest
import torch
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.errors import VlmtokWarning

from .build import FAMILIES, shared
from .harness import MODES, batch, generate
from .methods import InTower, Top, compressed
from .oracle import Cut

WAYS = ("boundary", "decoder", "both")


def model_of(name):
    return shared(name, FAMILIES[name].attentions[0])


def merged(model, inputs):
    """What the bare host makes of a prompt with pictures, as a caller would give it."""
    found = []
    hook = adapter_for(model).lm.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    given = {"inputs_embeds": found[0]["inputs_embeds"].detach()}
    if found[0].get("per_layer_inputs") is not None:  # Gemma 4 cannot make them of embeddings
        given["per_layer_inputs"] = found[0]["per_layer_inputs"].detach()
    if "attention_mask" in inputs:
        given["attention_mask"] = inputs["attention_mask"]
    return given


def of_ours(caught):
    return [str(one.message) for one in caught if issubclass(one.category, VlmtokWarning)]


def call(model, given):
    """The text model, which every family has; several inner models compute masks from token ids."""
    with torch.no_grad():
        return adapter_for(model).lm(**given).last_hidden_state


@pytest.mark.parametrize("mode", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_embeddings_are_let_pass_with_one_warning(name, mode):
    model = model_of(name)
    given = merged(model, batch(name).inputs())
    bare = call(model, given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with compressed(model, MODES[mode]) as run:
            for _ in range(2):
                assert torch.equal(call(model, given), bare)
            said = of_ours(caught)
            problem = run.report().problem
        after = of_ours(caught)[len(said) :]
    assert len(said) == 1, said
    assert all(f"{method} " in said[0] for method in run.methods)
    assert "cut nothing in this prompt" in said[0] and "pixel_values" in said[0] and "input_ids" in said[0]
    assert problem is not None and "embeddings alone" in problem
    assert len(after) == 1 and "embeddings alone" in after[0], "the word at the end names the same reason"


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_generate_from_merged_embeddings_warns_once_and_not_in_decode_steps(name):
    model = model_of(name)
    given = merged(model, batch(name).inputs())
    bare = generate(model, given)
    with warnings.catch_warnings(record=True) as caught, compressed(model, MODES["both"]):
        warnings.simplefilter("always")
        found = generate(model, given)
        assert len(of_ours(caught)) == 1, of_ours(caught)
    assert torch.equal(found[0], bare[0]) and torch.equal(found[1], bare[1])


@pytest.mark.parametrize("which", ["pictures", "text"])
@pytest.mark.parametrize("name", FAMILIES)
def test_token_ids_bring_no_warning(name, which):
    """With pictures, decode steps included, and without any."""
    model = model_of(name)
    rows = batch(name) if which == "pictures" else FAMILIES[name].batch("7", "5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with compressed(model, MODES["both"]):
            generate(model, rows.inputs())
            assert not of_ours(caught), of_ours(caught)


def test_a_prompt_of_embeddings_behind_pictures_that_were_cut_warns_too():
    model, rows = model_of("llava"), batch("llava")
    given = merged(model, rows.inputs())
    with compressed(model, MODES["both"]) as run:
        generate(model, rows.inputs())
        with pytest.warns(VlmtokWarning, match="cut nothing in this prompt"):
            generate(model, given)
        assert run.report().problem is None


def test_features_that_were_cut_by_the_tower_may_be_merged_by_the_caller():
    """A method of the tower has done its work where its features come merged; one of the language model has not."""
    model, rows = model_of("llava"), batch("llava")
    inputs = rows.inputs()
    ids = inputs.pop("input_ids")
    with warnings.catch_warnings(record=True) as caught, vlmtok.compress(model, [InTower(), Top(Cut(0.5))]):
        warnings.simplefilter("always")
        with torch.no_grad():
            model.model.get_image_features(inputs["pixel_values"])
            embeds = model.get_input_embeddings()(ids)
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        said = of_ours(caught)
    assert len(said) == 1 and said[0].startswith("top cut nothing in this prompt")
