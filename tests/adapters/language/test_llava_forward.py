"""Plain forwards of LLaVA: lengths, gradients, embeddings, text alone, half precision, what the host is handed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import models, oracle
from support.checks import assert_equal, assert_same, gap
from support.hosts_of import checkpoint
from support.llava_by_oracle import CUTS, decider, generated, llava
from support.models import PLACEHOLDERS, Batch
from vlmtok.adapters.host_objects import checkpoints_whole_calls

import vlmtok
from vlmtok.errors import UnsupportedModel


def text_places(batch, row):
    """Columns of the text of a row, places in the row without padding."""
    return (batch.rows[row] != models.IMAGE).nonzero()[:, 0]


def expected_logits(model, batch, row, methods, run):
    """Logits of the text columns of a row, by the oracle."""
    reference = oracle.Llava(model)
    hidden, kept = reference.forward(batch.rows[row], batch.pixels[row], decider(methods, run)(), row)
    at = {int(place): i for i, place in enumerate(kept.place.tolist())}
    return model.lm_head(hidden[[at[int(c)] for c in text_places(batch, row)]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "cut", ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered", "everything"]
)
def test_a_plain_forward_returns_the_original_length(cut, attention, side):
    """Every text column has the logits that the shortened row gives it, with left and right padding."""
    model, batch, methods = llava(attention), Batch.of("^3I5", "2I2", "^2I1I4", "6", "^1II3"), CUTS[cut]
    given = batch.inputs(side=side)
    with torch.no_grad():
        bare = model(**given).logits
        with vlmtok.compress(model, methods) as run:
            found = model(**given)
    assert found.logits.shape == bare.shape
    changed = 0.0
    for row in range(len(batch)):
        length = len(batch.rows[row])
        whole = found.logits[row, -length:] if side == "left" else found.logits[row, :length]
        before = bare[row, -length:] if side == "left" else bare[row, :length]
        with torch.no_grad():
            wanted = expected_logits(model, batch, row, methods, run)
        assert_equal(whole[text_places(batch, row)], wanted, what=f"row {row}")
        changed = max(changed, gap(whole[text_places(batch, row)], before[text_places(batch, row)]))
    assert changed > 1e-3


@pytest.mark.parametrize("cut", ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered"])
def test_a_forward_without_mask_and_cache_is_no_packed_sequence(cut):
    """transformers reads a jump in position_ids, without mask and cache, as a new sequence."""
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    given = batch.inputs(mask=False)
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        plain = model(**given, use_cache=False).logits
        cached = model(**given, use_cache=True).logits
        masked = model(**given, attention_mask=torch.ones_like(given["input_ids"]), use_cache=False).logits
    with torch.no_grad():
        wanted = expected_logits(model, batch, 0, methods, run)
    for found in (plain, cached, masked):
        assert_equal(found[0, text_places(batch, 0)], wanted)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered", "everything"])
def test_loss_and_gradients_equal_the_oracle(cut, train):
    """Labels keep the original length; pictures carry no labels, as every processor has it."""
    model = models.llava(depth=6).train(train)
    batch, methods = Batch.of("^3I5", "2I2", "^2I1I4"), CUTS[cut]
    given = batch.inputs(side="right")
    labels = given["input_ids"].masked_fill((given["input_ids"] == models.IMAGE) | (given["attention_mask"] == 0), -100)
    with vlmtok.compress(model, methods) as run:
        found = model(**given, labels=labels, use_cache=False)
        found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count = 0.0, 0
    reference = oracle.Llava(model)
    for row in range(len(batch)):
        ids = batch.rows[row]
        hidden, kept = reference.forward(ids, batch.pixels[row], decider(methods, run)(), row)
        # Column i predicts i + 1: the last one kept before it stands for a column that left.
        place = kept.place
        for target in range(1, len(ids)):
            if ids[target] == models.IMAGE:
                continue
            at = int((place < target).nonzero()[-1])
            total = total + F.cross_entropy(model.lm_head(hidden[at]), ids[target], reduction="sum")
            count += 1
    loss = total / count
    loss.backward()
    assert_equal(found.loss.detach(), loss.detach())
    assert any("vision_tower" in name for name in gradients)
    assert any("projector" in name for name in gradients)
    for name, p in model.named_parameters():
        if p.grad is not None and float(p.grad.abs().max()) > 0:
            assert_equal(gradients[name], p.grad, 2e-5, f"gradient of {name}")


@pytest.mark.parametrize("cut", ["boundary renumbered", "everything"])
def test_gradient_checkpointing_of_the_language_model(cut):
    """Layers that autograd runs again get the rows of their own forward."""
    model = models.llava(depth=6).train()
    batch, methods = Batch.of("^3I5", "^2I1I4"), CUTS[cut]
    given = batch.inputs(side="right")
    labels = given["input_ids"].masked_fill(given["input_ids"] == models.IMAGE, -100)
    found = []
    for again in (False, True):
        if again:
            checkpoint(model)
            if cut == "everything" and checkpoints_whole_calls(model.model.language_model.layers[0]):
                with vlmtok.compress(model, methods), pytest.raises(UnsupportedModel, match=r"5\.23"):
                    model(**given, labels=labels, use_cache=False)
                return
        model.zero_grad()
        with vlmtok.compress(model, methods):
            model(**given, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, value in found[0].items():
        assert_equal(found[1][name], value, 2e-5, f"gradient of {name}")


def test_embeddings_instead_of_ids():
    model, batch = llava(), Batch.of("^3I5", "^2I1I4")
    given = batch.inputs()
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    by_embeds = {"inputs_embeds": embeds, **{k: v for k, v in given.items() if k != "input_ids"}}
    with torch.no_grad(), vlmtok.compress(model, CUTS["everything"]):
        wanted = model(**given).logits
        assert_equal(model(**by_embeds).logits, wanted)
        tokens = model.generate(**given, max_new_tokens=3, do_sample=False)[:, -3:]
        by_embeds_tokens = model.generate(**by_embeds, max_new_tokens=3, do_sample=False)[:, -3:]
    assert tokens.tolist() == by_embeds_tokens.tolist()


def test_text_only_calls_are_bit_identical():
    model, batch = llava(), Batch.of("6", "^9")
    given = batch.inputs()
    with torch.no_grad():
        bare, answer = model(**given).logits, generated(model, batch)[1]
        with vlmtok.compress(model, CUTS["everything"]) as run:
            assert_same(model(**given).logits, bare)
            assert_same(generated(model, batch)[1], answer)
            generated(model, Batch.of("^3I5"))
            assert_same(model(**given).logits, bare, "text after a picture")
            assert run.active


def test_the_inner_model_alone():
    model, batch = llava(), Batch.of("^3I5", "^2I1I4")
    with torch.no_grad():
        with vlmtok.compress(model, CUTS["everything"]):
            wanted = model(**batch.inputs()).logits
        with vlmtok.compress(model.model, CUTS["everything"]):
            hidden = model.model(**batch.inputs()).last_hidden_state
    assert_same(model.lm_head(hidden).detach(), wanted)


def test_half_precision_generates():
    model = models.llava(depth=6, dtype=torch.bfloat16)
    batch = Batch.of("^3I5", "^2I1I4")
    given = batch.inputs()
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    with vlmtok.compress(model, "pitome:ratio=0.8+todre:keep=0.5:tau=0.9:check_layer=3+fastv:K=2:keep=0.5"):
        assert model.generate(**given, max_new_tokens=3, do_sample=False).shape == (2, given["input_ids"].shape[1] + 3)


def test_features_are_padded_for_the_host_and_zeros_never_reach_the_language_model():
    """get_image_features keeps the number of placeholders; what is empty leaves at the boundary."""
    model = llava()
    x = models.pictures(2, size=(32, 32))
    with torch.no_grad(), vlmtok.compress(model, "pitome:ratio=0.6"):
        features = torch.stack(model.get_image_features(x).pooler_output)
        assert features.shape[1] == PLACEHOLDERS
        empty = (features == 0).all(-1)
        assert bool(empty.any())
        seen = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        model(**Batch.of("^3I5").inputs())
        handle.remove()
    assert seen
    assert not bool((seen[0] == 0).all(-1).any())
