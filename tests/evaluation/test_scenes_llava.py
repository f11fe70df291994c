"""The second checkpoint that ships, and the code in `examples/scenes_llava` that makes it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from support.places import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from scenes_llava.album import KIND_NAMES, LENGTH, draw_album
from scenes_llava.batches import lay_out
from scenes_llava.card import conversation, score
from scenes_llava.language import accuracy, answer_logits, train_stage
from scenes_llava.processor import POSITIONS, build_processor, ids, index, vocabulary
from scenes_llava.store import Store, seeded
from scenes_llava.targets import GRIDS, read_patches
from scenes_llava.tower import build_tower, look, see, train_tower
from scenes_llava.words import align, said
from tiny_llava.alignment import initialise_words
from tiny_llava.evaluate import Checkpoint
from tiny_llava.language import Stage, build_llava, initialise_attention, llava_config, loudness
from tiny_llava.training import Optimizer

import vlmtok
from vlmtok.evaluation.scenes import exam
from vlmtok.evaluation.scenes.layouts import sample_page

FOLDER = ROOT / "vlmtok" / "data" / "scenes-llava"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(FOLDER)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    return Store(draw_album(folder, "held-out", 1, 16, 1), CPU)


# ---------------------------------------------------------------------- what ships
def test_it_is_small_and_shows_as_many_tokens_as_llava_1_5(checkpoint):
    config = checkpoint.model.config
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 11e6
    assert config.image_seq_length == 576 and config.text_config.num_hidden_layers == 16
    assert checkpoint.model.dtype == torch.float32
    assert (FOLDER / "README.md").read_text("utf-8").count("| all |") == 1
    assert min(norm for norms in loudness(checkpoint.model) for norm in norms) > 0.1  # every layer speaks


def test_it_answers_and_needs_pictures_and_tokens(checkpoint):
    questions = exam(48, seed="fresh")
    whole = score(checkpoint, questions, CPU)
    assert whole["all"] >= 0.9, whole
    assert score(checkpoint, questions, CPU, pictures=False)["all"] <= 0.35
    with vlmtok.compress(checkpoint.model, "random:keep=0.1"):
        assert score(checkpoint, questions, CPU)["all"] <= whole["all"] - 0.3
    assert whole == score(checkpoint, questions, CPU)


def test_its_processor_is_the_one_the_code_builds(checkpoint):
    """By what it does: how it is written differs between releases of transformers."""
    made = build_processor()
    for asked in exam(24):
        texts = [
            processor.apply_chat_template(conversation(asked), add_generation_prompt=True)
            for processor in (made, checkpoint.processor)
        ]
        assert texts[0] == texts[1]
        pictures = [page.draw() for page in asked.pictures]
        read = [
            processor(images=pictures, text=texts[0], return_tensors="pt") for processor in (made, checkpoint.processor)
        ]
        assert all(torch.equal(read[0][name], read[1][name]) for name in ("input_ids", "pixel_values"))


def test_two_pictures_have_names_and_one_has_none(checkpoint):
    for asked in exam(24):
        text = checkpoint.processor.apply_chat_template(conversation(asked), add_generation_prompt=True)
        assert ("first picture:" in text) == (len(asked.pictures) == 2)
        assert "<unk>" not in checkpoint.processor.tokenizer.decode(checkpoint.processor.tokenizer(text).input_ids)


# ---------------------------------------------------------------------- how it is made
def test_every_digit_of_fine_print_is_the_business_of_some_patch():
    for i in range(20):
        page = sample_page("train", "scene", "patches", i)
        patches = read_patches(page, GRIDS[0])
        for number, mark in enumerate(page.marks):
            mine = patches.owner == number
            assert mine.any(), mark
            assert set(patches.step[mine]) >= set(range(1, len(mark.text) + 1)), mark


def test_a_row_with_many_questions_is_each_prompt_by_itself(checkpoint, store):
    """The logits behind packed questions are those that the processor's own prompt gives."""
    model = checkpoint.model
    for two in (False, True):
        rows = np.array([0])  # a scene; its pair is the next
        batch, pages = lay_out(store, rows, GRIDS[0], two, None, True, seeded(CPU, 0))
        features = torch.cat([look(model.model.vision_tower, store, page, GRIDS[0], None) for page in pages], 1)
        with torch.no_grad():
            packed = answer_logits(model, batch, features.float()).unflatten(1, (-1, LENGTH))[0]
        for number in (0, 1):
            asked = int((batch.targets.unflatten(1, (-1, LENGTH))[0, number] >= 0).nonzero()[0])
            text = batch.text.unflatten(1, (-1, LENGTH))[0, number, : asked + 1]
            row = torch.cat([torch.where(batch.before < 0, index()["<image>"], batch.before), text])[None]
            pixels = torch.cat([store.pixels(page, GRIDS[0], None) for page in pages])
            with torch.no_grad():
                alone = model(input_ids=row, pixel_values=pixels).logits[0, -1]
            torch.testing.assert_close(packed[number, asked], alone, atol=0.15, rtol=0.05)  # features in bfloat16
            assert packed[number, asked].argmax() == alone.argmax()


def test_what_is_drawn_touches_every_mark_and_two_pages_have_equal_parts(store):
    for two, keep in ((False, 96), (True, 192)):
        batch, _ = lay_out(store, np.array([0, 1]), GRIDS[0], two, keep, False, seeded(CPU, 1))
        owner = store.patches(np.array([0, 1]), GRIDS[0])["owner"]
        first = batch.kept < 576
        assert (first.sum(1) == 96).all() and (batch.kept.diff(dim=1) > 0).all()
        for b in range(2):
            assert set(owner[b].tolist()) == set(owner[b][batch.kept[b][first[b]]].tolist())
        # Positions are those of the whole row, and questions follow it.
        place = (batch.before < 0).nonzero()[:, 0]
        gap = 3 if two else 0  # "first picture :" and "second picture :"
        whole = batch.kept + 2 + gap * (1 + (batch.kept >= 576))
        assert torch.equal(batch.positions[:, place], whole)
        assert (batch.positions[:, len(batch.before)] == 2 + (576 + gap) * (1 + two)).all()


def test_smaller_pictures_go_through_with_interpolated_positions(checkpoint, store):
    hidden = see(checkpoint.model.model.vision_tower, store.pixels(np.arange(2), GRIDS[2], None))
    assert hidden[-2].shape == (2, 1 + GRIDS[2] ** 2, 128)


def test_training_goes_on_where_it_stopped(store, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def step(self, loss, number, real=Optimizer.step):
        if number == 2:
            raise Stopped
        real(self, loss, number)

    for name in ("through", "stopped"):
        (tmp_path / name).mkdir()
    through = train_tower(tmp_path / "through", store, store, 0, 4, 4, log_every=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Optimizer, "step", step)
        train_tower(tmp_path / "stopped", store, store, 0, 4, 4, log_every=2)
    stopped = train_tower(tmp_path / "stopped", store, store, 0, 4, 4, log_every=2)
    assert all(torch.equal(a, b) for a, b in zip(through.state_dict().values(), stopped.state_dict().values()))


def test_words_and_decoder_learn(store, tmp_path):
    torch.manual_seed(0)
    llava = build_llava(build_tower(), llava_config(build_tower(), 2, vocabulary(), POSITIONS))
    initialise_words(llava, index())
    initialise_attention(llava)
    table = llava.get_input_embeddings().weight.detach()
    truth = store.patches(np.arange(4), GRIDS[0])
    words = said(truth, table) @ table.T
    red = (truth["color"] == 1) & (truth["owner"] >= 0)
    assert (words[red][:, index()["red"]] > 0.9).all() and (words[~red][:, index()["red"]] < 0.1).all()
    align(llava, store, tmp_path / "words.pt", 0, 2, 4)
    stage = Stage("trial", steps=2, batch=4, guided=(1,))
    train_stage(llava, store, store, tmp_path, stage, 0)
    assert set(accuracy(llava, store)) <= {*KIND_NAMES, "all"}
    assert len(ids("407")) == 3
