"""What a model says along the bare model's answer, against answers of its own and sums by hand."""

import pytest
import torch
from families.build import FAMILIES, TOWER_ONLY, shared
from families.checkpoints import READERS, TEMPLATE, tokenizer
from PIL import Image
from support import checkpoints

import vlmtok
from vlmtok.evaluation.downsample import downsample
from vlmtok.evaluation.witness import hear, loyalty
from vlmtok.lab.prompts import encode_prompt
from vlmtok.loading import Loaded, load, open_picture, samples

SPECS = ("random:keep=0.5", "fastv:keep=0.1", "todre:keep=0.1", "divprune:keep=0.05")


@pytest.fixture(scope="module")
def model():
    return load(device="cpu")


@pytest.fixture(scope="module")
def asked(model):
    return [(open_picture(one.path), one.question) for one in samples()]


def test_the_bare_model_stays_with_itself(model, asked):
    for image, question in asked[:3]:
        bare = hear(model, image, question, 8)
        again = loyalty(model, bare, hear(model, image, question, 8, bare))
        assert (again.same, again.tokens, again.divergence) == (True, 1.0, 0.0)
        assert again.cosine == pytest.approx(1.0, abs=1e-6) and bare.choices == bare.answer.ids
        assert bare.logits.shape[0] == bare.features.shape[0] == len(bare.answer.ids) > 1


def test_agreement_is_that_of_answers_of_its_own(model, asked):
    """Token by token along the bare answer says the same as an answer of its own."""
    agreed = set()
    for image, question in asked:
        bare = hear(model, image, question, 8)
        for spec in SPECS:
            with vlmtok.compress(model.model, spec):
                along, own = hear(model, image, question, 8, bare), hear(model, image, question, 8)
            found = loyalty(model, bare, along)
            assert found.same == (own.answer.ids == bare.answer.ids) == (found.tokens == 1.0)
            agreed.add(found.same)
    assert agreed == {True, False}


def test_divergence_by_hand(model, asked):
    """Places behind the first are those of the bare model's tokens: one pass of prompt and answer has the same."""
    image, question = asked[4]
    bare = hear(model, image, question, 8)
    seen = []
    with vlmtok.compress(
        model.model, "divprune:keep=0.05"
    ):  # chosen by the picture alone, so that the answer may stand
        along = hear(model, image, question, 8, bare)
        given = encode_prompt(model, image, question)
        ids = torch.cat([given["input_ids"], torch.tensor([bare.answer.ids[:-1]])], 1)
        hook = model.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad(), hook:
            mask = torch.ones_like(ids)
            logits = model.model(input_ids=ids, attention_mask=mask, pixel_values=given["pixel_values"]).logits
    count = len(bare.answer.ids)
    assert along.choices[0] != bare.answer.ids[0] and count > 1  # else its own tokens would do
    torch.testing.assert_close(along.logits, logits[0, -count:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(along.features, seen[0][0, -count:], atol=1e-4, rtol=1e-4)
    p, q = bare.logits.double().log_softmax(-1), logits[0, -count:].double().log_softmax(-1)
    found = loyalty(model, bare, along)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    wanted = torch.cosine_similarity(bare.features, seen[0][0, -count:], dim=-1).mean()
    assert found.cosine == pytest.approx(float(wanted), abs=1e-4) and found.divergence > 0.1 and not found.same


def test_a_smaller_picture_is_heard_too(model, asked):
    image, question = asked[1]
    bare = hear(model, image, question, 8)
    small = downsample(model, image, tokens=0.25).loaded
    found = loyalty(model, bare, hear(small, image, question, 8, bare))
    assert found.divergence > 0.1 and found.cosine < 0.99


def test_nothing_stays_on_the_model(model, asked):
    image, question = asked[0]
    before = len(model.model.get_output_embeddings()._forward_pre_hooks)
    hear(model, image, question, 2)
    with pytest.raises(AssertionError):
        hear(model, image, None, 2)
    assert len(model.model.get_output_embeddings()._forward_pre_hooks) == before


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl", "aya_vision", "blip-2"])
def test_families(name):
    """Each speaks and stays with itself; with most tokens dropped it says something else, or with other weight."""
    reader = READERS[name]
    made = reader.make(tokenizer(reader), chat_template=TEMPLATE.replace("IMAGE", reader.shown))
    model = Loaded(name, shared(name, {**FAMILIES, **TOWER_ONLY}[name].attentions[0]), made, True)
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    image = Image.fromarray(pixels.numpy())
    bare = hear(model, image, "what color ?", 4)
    same = loyalty(model, bare, hear(model, image, "what color ?", 4, bare))
    assert same.same and same.divergence == 0 and same.tokens == 1
    spec = "tome:r=3" if name == "blip-2" else "random:keep=0.3"
    with vlmtok.compress(model.model, spec):
        kept = loyalty(model, bare, hear(model, image, "what color ?", 4, bare))
    assert kept.divergence > 0 and len(bare.answer.ids) == 4


def test_towers(tmp_path):
    """Classes by name and their distribution; an embedding by its cosine."""
    checkpoints.vit(tmp_path)
    model = load(str(tmp_path), device="cpu")
    image = checkpoints.picture()
    bare = hear(model, image, None, 1)
    with vlmtok.compress(model.model, "tome:r=8"):
        found = loyalty(model, bare, hear(model, image, None, 1, bare))
    assert found.divergence > 0 and found.cosine < 1 and found.tokens is None
    assert loyalty(model, bare, bare).same and loyalty(model, bare, bare).divergence == 0
