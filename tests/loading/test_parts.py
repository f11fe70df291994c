"""Loaded models and budgets show themselves: which tower, how deep, how many visual tokens."""

import dataclasses

import torch
from support.checkpoints import FAMILIES, vit
from support.tables import cells

import vlmtok
from vlmtok import loading


def parts(model):
    found = cells(model._repr_html_())[2:]
    return dict(zip(found[::2], found[1::2]))


def test_a_vision_language_model(speaker):
    found = parts(speaker)
    assert found["family"] == "transformers-vlm (llava)" and found["visual tokens of a picture"] == "144"
    assert found["vision tower"].startswith("5 layers, 64 channels, 145 tokens (1 of them no patches), ")
    assert "vision_tower" in found["vision tower"] and found["vision tower"].endswith("of CLIPEncoderLayer")
    assert found["language model"] == "16 layers, 64 channels, 4 heads"
    assert found["tokens can leave at"] == "vision, features, projected, decoder, cache"
    assert repr(speaker) == (
        f"<Loaded {speaker.name}: LlavaForConditionalGeneration, {speaker.parameters:,} parameters, float32 on cpu>"
    )
    shown = "".join(str(speaker).split())  # a long name is folded
    assert "languagemodel" in shown and "".join(repr(speaker)[8:-1].split()) in shown


def test_pictures_of_their_own_size_and_towers(tmp_path):
    model = loading.load(str(FAMILIES["qwen2_5_vl"](tmp_path / "qwen")))
    assert parts(model)["visual tokens of a picture"] == "depend on its size"
    tower = loading.load(str(vit(tmp_path / "vit")))
    assert parts(tower)["visual tokens of a picture"] == "36" and "language model" not in parts(tower)
    assert "4 layers, 32 channels, 37 tokens" in parts(tower)["vision tower"]


def test_random_weights_and_models_that_nothing_carries_say_so(speaker):
    assert "weights are random" in str(dataclasses.replace(speaker, trained=False))
    other = loading.Loaded("a <b>", torch.nn.Linear(2, 2), None, False)
    shown = other._repr_html_()
    assert "cannot be compressed: no adapter carries" in shown and "a &lt;b&gt;" in shown and "<b>:" not in shown
    assert repr(other) == "<Loaded a <b>: Linear, 6 parameters, float32 on cpu>"


def test_budgets(speaker):
    found = vlmtok.budget("divprune", speaker.model, tokens=20).budget
    assert cells(found._repr_html_())[6:] == ["tokens", "144 tokens", "20 tokens", "20 tokens", "20", "20"]
    assert repr(found) == "<Budget: tokens = 20 tokens on LlavaForConditionalGeneration, 20 tokens asked>"
    assert str(found).startswith(
        "tokens = 20 tokens on LlavaForConditionalGeneration, 20 tokens asked; visual tokens: 20"
    )
