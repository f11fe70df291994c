"""The checkpoint that ships with the package, its sample pictures, and the code in `examples/` that makes them."""

from __future__ import annotations

import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.places import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from tiny_llava.alignment import initialise_words, words_of
from tiny_llava.evaluate import Checkpoint, score
from tiny_llava.export import STORED, WRITTEN, store
from tiny_llava.language import answer_logits, build_llava, deepen, llava_config, look_away, loudness
from tiny_llava.packing import Album, pack, shorten
from tiny_llava.processor import vocabulary
from tiny_llava.samples import choose_samples, draw_sample
from tiny_llava.scenes import QUESTION_TYPES, ask, ask_all, exam, render, sample_scene
from tiny_llava.tower import TOKENS, build_tower, find_cells, find_centres
from tiny_llava.training import watch_attention
from transformers import LlavaForConditionalGeneration

FOLDER = ROOT / "vlmtok" / "data" / "tiny-llava"
PICTURES = ROOT / "vlmtok" / "data" / "pictures"


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(FOLDER)


# ---------------------------------------------------------------------- what ships
def test_the_checkpoint_is_small_and_deep_enough(checkpoint):
    config = checkpoint.model.config
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 14e6
    assert config.image_seq_length >= 144 and config.text_config.num_hidden_layers >= 16
    assert checkpoint.model.dtype == torch.float32
    assert (FOLDER / "README.md").read_text("utf-8").count("| all |") == 1


def test_its_names_are_read_by_vllms_own_llava_too(checkpoint):
    """vLLM 0.32 knows the tower under these names alone; transformers would write others."""
    names = list(load_file(FOLDER / "model.safetensors"))
    assert len(names) == len(checkpoint.model.state_dict())
    tower = [name for name in names if "vision" in name]
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert {name.partition(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}


def test_both_spellings_are_the_same_model_bit_for_bit(checkpoint, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "written")
    weights = tmp_path / "written" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name.replace(STORED, WRITTEN): tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    found, states, logits = [], [], []
    question = ask_all(sample_scene("held-out", "spelling", 0), random.Random(0))[0]
    for folder in (FOLDER, tmp_path / "written"):
        model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        found.append({key: value for key, value in info.items() if value})
        states.append(model.state_dict())
        inputs = checkpoint.inputs([render(sample_scene("held-out", "spelling", 0))], [question.text])
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert found == [{}, {}]  # nothing missing, nothing left over
    stored, written = states
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)
    assert torch.equal(*logits)


def test_what_is_exported_is_what_ships(checkpoint, tmp_path):
    checkpoint.model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    for _ in range(2):  # the second time changes nothing
        store(weights)
        ships, exported = load_file(FOLDER / "model.safetensors"), load_file(weights)
        assert ships.keys() == exported.keys() and {tensor.dtype for tensor in exported.values()} == {torch.float16}
        assert all(torch.equal(ships[name], exported[name]) for name in ships)


def test_every_layer_speaks(checkpoint):
    assert min(norm for norms in loudness(checkpoint.model) for norm in norms) > 0.1


def test_it_answers_the_questions_that_ship(checkpoint):
    rows = json.loads((PICTURES / "questions.json").read_text("utf-8"))
    pictures = [Image.open(PICTURES / row["picture"]) for row in rows]
    assert len(rows) >= 4 and any(picture.width != picture.height for picture in pictures)
    answers = checkpoint.answer(pictures, [row["question"] for row in rows])
    assert [answer.strip() for answer in answers] == [row["answer"] for row in rows]


def test_the_pictures_that_ship_are_the_held_out_scenes_they_are_drawn_from():
    rows = json.loads((PICTURES / "questions.json").read_text("utf-8"))
    for row, (name, scene, question) in zip(rows, choose_samples(), strict=True):
        assert scene.split == "held-out"
        assert row == {
            "picture": name,
            "question": question.text,
            "answer": question.answer,
            "cells": list(question.cells),
        }
        drawn = np.asarray(draw_sample(scene, wide=name.startswith("wide")), int)
        assert np.abs(drawn - np.asarray(Image.open(PICTURES / name), int)).mean() < 1


def test_it_needs_the_picture_and_its_tokens(checkpoint):
    questions = exam(60, "fresh")
    whole = score(questions, checkpoint.answer, batch=60)
    assert whole["all"] >= 0.92, whole
    assert score(questions, lambda pictures, texts: checkpoint.answer(None, texts), batch=60)["all"] <= 0.5
    nothing = score(
        questions,
        lambda pictures, texts: checkpoint.answer_from(
            pictures, texts, lambda visual: torch.arange(0, TOKENS, 10).expand(len(visual), -1)
        ),
        batch=60,
    )
    assert nothing["all"] <= whole["all"] - 0.15


# ---------------------------------------------------------------------- scenes and questions
def test_splits_are_disjoint_whatever_the_sizes():
    train, held_out = (
        {sample_scene(split, "split", i).arrangement for i in range(200)} for split in ("train", "held-out")
    )
    assert len(train) > 190 and len(held_out) > 190 and not train & held_out


def test_scenes_pictures_and_questions_follow_from_the_seed():
    once, again = sample_scene("train", 3, 1), sample_scene("train", 3, 1)
    assert once == again != sample_scene("train", 3, 2)
    assert np.array_equal(np.asarray(render(once)), np.asarray(render(again)))
    assert exam(12, "seed") == exam(12, "seed") != exam(12, "another seed")


def test_answers_hold_in_the_scene():
    for i in range(60):
        scene = sample_scene("train", "answers", i)
        by_cell = {thing.cell: thing for thing in scene.things}
        for kind in QUESTION_TYPES:
            question = ask(scene, kind, random.Random(i))
            if question is None:
                continue
            asked = [by_cell[cell] for cell in question.cells]
            if kind == "count":
                assert question.answer == str(len(asked))
                continue
            (thing,) = asked
            row, column = divmod(thing.cell, 3)
            place = f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"
            answer = {"color": thing.color, "where": place, "what is at": f"{thing.color} {thing.kind}"}
            assert question.answer == answer.get(kind, thing.kind)
            assert kind != "what is at" or place in question.text


def test_patches_say_what_they_show():
    scene = sample_scene("train", "words", 0)
    words, fair = words_of(scene)
    said = [{vocabulary()[i] for i in np.flatnonzero(row)} for row in words]
    cells = find_cells(scene)
    for patch in np.flatnonzero(cells < 0):
        assert said[patch] <= {"<image>", "thing"}
    for thing in scene.things:
        patches = np.flatnonzero(cells == thing.cell)
        assert len(patches) >= 2 and fair[patches].all()
        assert all({thing.color, thing.kind, "<image>"} < said[patch] for patch in patches)
        assert sum("thing" in said[patch] for patch in patches) == 1


# ---------------------------------------------------------------------- the language model's batches
@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    llava = build_llava(build_tower(), llava_config(build_tower(), depth=3))
    initialise_words(llava)
    return llava.eval()


@pytest.fixture(scope="module")
def album():
    scenes = [sample_scene("train", "album", i) for i in range(3)]
    features = np.random.default_rng(0).standard_normal((3, TOKENS, 128)).astype(np.float16)
    cells, centres = (np.stack([find(scene) for scene in scenes]) for find in (find_cells, find_centres))
    return Album(scenes, features, cells, centres)


def test_a_packed_question_is_the_prompt_of_a_single_turn(untrained, album):
    processor = Checkpoint(FOLDER).processor
    questions = [ask_all(scene, random.Random(5)) for scene in album.scenes]
    rng = random.Random()
    rng.random = lambda: 1.0  # leave every question mark
    packed = pack(album, np.arange(3), questions, rng, None, renumber=True)
    untrained.set_attn_implementation("matmul")
    with torch.no_grad():
        found = answer_logits(untrained, packed)
    untrained.set_attn_implementation("sdpa")
    first = 0
    for picture, asked in enumerate(questions):
        projected = untrained.model.multi_modal_projector(torch.from_numpy(album.features[picture]).float())
        for question in asked:
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            prompt = processor.apply_chat_template(turn, add_generation_prompt=True) + f" {question.answer}</s>"
            blank = Image.new("RGB", (96, 96))
            ids = processor(images=blank, text=prompt, return_tensors="pt")["input_ids"]
            embedded = untrained.get_input_embeddings()(ids)
            embedded = embedded.masked_scatter((ids == untrained.config.image_token_id).unsqueeze(-1), projected)
            with torch.no_grad():
                logits = untrained(inputs_embeds=embedded).logits[0]
            answer = len(question.answer.split()) + 1
            torch.testing.assert_close(found[first : first + answer], logits[-answer - 1 : -1], atol=2e-3, rtol=1e-3)
            first += answer
    assert first == len(found)


def test_shortened_pictures_keep_something_of_every_thing(album):
    shown = shorten(album.cells, album.centres, 16, np.random.default_rng(0))
    assert shown.shape == (3, 16) and (np.diff(shown) > 0).all()
    for scene, cells, centres, chosen in zip(album.scenes, album.cells, album.centres, shown):
        assert centres[chosen].sum() == len(scene.things)
        assert all((cells[chosen] == thing.cell).sum() >= 2 for thing in scene.things)


def test_guidance_is_least_where_heads_look_at_what_decides(untrained, album):
    questions = [[ask(scene, "what is at", random.Random(1))] for scene in album.scenes]
    packed = pack(album, np.arange(3), questions, random.Random(0), None, renumber=True)
    untrained.set_attn_implementation("matmul")
    with torch.no_grad(), watch_attention([untrained.model.language_model.layers[1].self_attn]) as weights:
        answer_logits(untrained, packed)
    (seen,) = weights
    rows = packed.look.any(2)
    right = torch.zeros_like(seen)
    right[:, :, -packed.look.shape[1] :, 2 : 2 + TOKENS] = (
        packed.look / packed.look.sum(2, keepdim=True).clamp_min(1)
    )[:, None]
    assert rows.any() and look_away([right], packed) < 0.01 < look_away([seen], packed)
    assert not hasattr(untrained.model.language_model.layers[1].self_attn, "seen_weights")


def test_a_deepened_model_computes_the_same(untrained, album):
    questions = [ask_all(scene, random.Random(2)) for scene in album.scenes]
    packed = pack(album, np.arange(3), questions, random.Random(0), None, renumber=False)
    deeper = deepen(untrained, (0, 0, 1, 1, 1, 2)).eval()
    assert len(deeper.model.language_model.layers) == 6
    assert [norms == (0, 0) for norms in loudness(deeper)] == [True, False, True, True, False, False]
    logits = []
    for llava in (untrained, deeper):
        llava.set_attn_implementation("matmul")
        with torch.no_grad():
            logits.append(answer_logits(llava, packed))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
