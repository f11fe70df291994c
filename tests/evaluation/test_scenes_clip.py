"""Tasks `scenes-clip` and `scenes-shift` on a tiny CLIP, and the code in `examples/scenes_clip` that makes CLIPs."""

from __future__ import annotations

import random
import sys

import numpy as np
import open_clip
import pytest
import torch
from support.places import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from scenes_clip import model as making
from scenes_clip.album import GROUP, captions, draw_album, number_of
from scenes_clip.cross import train_cross
from scenes_clip.export import export, save_cross_tokens
from scenes_clip.model import build_clip, contrast, draw_batch, matches, pixels_of, train_clip
from scenes_clip.words import LENGTH, UNKNOWN, tokenizer, vocabulary
from scenes_llava.store import Store

import vlmtok
from vlmtok.errors import ParameterError, UnsupportedModel
from vlmtok.evaluation.dual import cross_tokens_of, give_cross_tokens, read, see
from vlmtok.evaluation.scenes.captioned import sample
from vlmtok.evaluation.scenes.galleries import gallery
from vlmtok.evaluation.scenes_clip import KINDS, SENTENCES, ScenesClip
from vlmtok.evaluation.scenes_shift import ScenesShift
from vlmtok.evaluation.task import TASKS, task_named

CPU = torch.device("cpu")
SPEC = "crossget:rv=8:rl=0:guidance=cross"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A narrow CLIP of two layers, trained for a few steps and exported, with its cross tokens, and its pictures."""
    patch = pytest.MonkeyPatch()
    for name, value in {"WIDTH": 32, "TEXT_WIDTH": 16, "LAYERS": 2, "EMBEDDING": 16}.items():
        patch.setattr(making, name, value)
    patch.setattr("scenes_clip.cross.SPEC", SPEC)
    work = tmp_path_factory.mktemp("clip")
    store = Store(draw_album(work / "train", "train", 0, 40, 1), CPU)
    clip = train_clip(work, store, store, 0, 3, 16)
    folder = work / "scenes-clip"
    export(clip, folder)
    save_cross_tokens(train_cross(clip, work, store, 0, 2, 8), folder, SPEC)
    patch.undo()
    return folder, store, clip


@pytest.fixture(scope="module")
def loaded(made):
    return vlmtok.load(str(made[0]))


def test_both_libraries_load_the_same_model(made, loaded):
    other = vlmtok.load(f"open_clip:local-dir:{made[0]}")
    assert isinstance(other.model, open_clip.CLIP) and other.trained
    texts = [one.caption for one in gallery(0)[:4]]
    assert torch.equal(loaded.words(texts), other.words(texts))
    pictures = [one.picture.draw() for one in gallery(0)[:3]]
    assert torch.allclose(loaded.pixels(pictures[0]), other.pixels(pictures[0]), atol=1e-5)
    assert torch.allclose(see(loaded, pictures), see(other, pictures), atol=1e-5)
    assert torch.allclose(read(loaded, texts), read(other, texts), atol=1e-5)
    assert see(loaded, pictures).std() > 0.01


def test_every_word_of_a_caption_is_known_and_none_is_cut():
    rng = random.Random(0)
    unknown = vocabulary().index(UNKNOWN)
    for seed in range(80):
        for claim in captions(sample("train", 1, seed)[0], rng):
            ids = tokenizer()(claim.text).input_ids
            assert unknown not in ids and len(ids) <= LENGTH and ids[-1] == len(vocabulary()) - 1
            assert tokenizer().decode(ids, skip_special_tokens=True) == claim.text


def test_what_is_true_of_what_in_a_batch(made):
    _, store, _ = made
    rows, chosen = draw_batch(store, 16, np.random.default_rng(0))
    text, true = matches(store, rows, chosen)
    assert true.diagonal().all() and [row // GROUP for row in rows[:4]] == [rows[0] // GROUP] * 4
    rng = random.Random("captions:train:0:0")
    group = sample("train", GROUP, 0, 0)
    for i, picture in enumerate(group):
        said = captions(picture, rng)
        assert store.rows("says", np.array([i]))[0].tolist() == [number_of(claim) for claim in said]
        assert tokenizer().decode(store.rows("text", np.array([i]))[0, 0], skip_special_tokens=True) == said[0].text
        assert np.array_equal(store.album.arrays["pixels"][i], np.asarray(picture.draw()))
    assert text.shape == (16, LENGTH)


def test_the_loss_is_clips_where_one_caption_is_true_and_least_where_all_true_ones_share():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 8)
    right = torch.arange(5)
    logits = 3 * torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T
    plain = (torch.nn.functional.cross_entropy(logits, right) + torch.nn.functional.cross_entropy(logits.T, right)) / 2
    assert torch.allclose(contrast(a, b, torch.tensor(3.0), torch.eye(5, dtype=torch.bool)), plain)
    same = torch.ones(1, 8).expand(2, 8)
    both = torch.ones(2, 2, dtype=torch.bool)
    assert torch.allclose(contrast(same, same, torch.tensor(9.0), both), torch.tensor(2.0).log())


def test_training_goes_on_where_it_was(made, tmp_path):
    folder, store, clip = made
    again = vlmtok.load(str(folder))
    with torch.no_grad():
        pixels = pixels_of(store, np.arange(2), None)
        assert torch.allclose(
            again.model.get_image_features(pixel_values=pixels).pooler_output,
            clip.get_image_features(pixel_values=pixels).pooler_output,
            atol=2e-2,
        )
    assert clip.logit_scale.exp() <= 100.01


# ---------------------------------------------------------------------- tasks
def test_questions_come_in_turn_and_repeat():
    assert {"scenes-clip", "scenes-shift"} <= set(TASKS)
    task = task_named("scenes-clip")
    items = task.items(9)
    assert [item.kind for item in items] == list(KINDS) * 3 and len({item.id for item in items}) == 9
    assert [item.id for item in task.items(30)][:9] == [item.id for item in items]
    kinds = [item.kind for item in ScenesShift(severities=(2,)).items(8)]
    assert kinds == ["clean", "noise 2", "blur 2", "contrast 2"] * 2
    with pytest.raises(ParameterError, match="no kind 'ocr'"):
        ScenesClip(kinds=["ocr"])
    with pytest.raises(ParameterError, match="1 to 5"):
        ScenesShift(severities=(0,))


def test_answers_are_the_nearest_ones(loaded):
    task = ScenesClip()
    items = task.items(12)
    batches = task.batches(loaded, items, 2)
    assert sorted(i for batch in batches for i in batch) == list(range(12)) and len(batches) == 2
    with torch.inference_mode():
        answered = [(items[i], o) for b in batches for i, o in zip(b, task.answer(loaded, [items[i] for i in b]))]
        outcomes = {item.id: outcome for item, outcome in answered}
        shown = gallery(0)
        table = see(loaded, [one.picture.draw() for one in shown]) @ read(loaded, [one.caption for one in shown]).T
        classes = read(loaded, SENTENCES)
        for item in items:
            found, asked = outcomes[item.id], item.what.shown
            if item.kind == "zero-shot":
                best = SENTENCES[int((see(loaded, task.pictures(item)) @ classes.T).argmax())]
                right = best == asked.caption
            elif item.kind == "picture to text":
                best = shown[int(table[shown.index(asked)].argmax())].caption
                right = best == asked.caption
            else:
                best = shown[int(table[:, shown.index(asked)].argmax())].id
                right = best == asked.id
            assert found.answer == best and found.quality == float(right)


def test_who_knows_everything_answers_all_of_it(loaded, monkeypatch):
    """With embeddings in which pictures and their captions meet, whatever the pixels show."""
    task = ScenesClip()
    items = task.items(30)
    captions = {one.picture.draw().tobytes(): one.caption for one in [*gallery(0), *(i.what.shown for i in items)]}
    places = {text: i for i, text in enumerate({*captions.values(), *SENTENCES})}
    table = torch.eye(len(places))
    by_text = {"read": lambda _, texts: table[[places[text] for text in texts]]}
    by_text["see"] = lambda _, pictures: by_text["read"](_, [captions[one.tobytes()] for one in pictures])
    by_text["classify"] = lambda _, pictures, texts: [list(texts).index(captions[one.tobytes()]) for one in pictures]
    for name, function in by_text.items():
        monkeypatch.setattr(f"vlmtok.evaluation.scenes_clip.{name}", function)
    assert [outcome.quality for outcome in task.answer(loaded, items)] == [1.0] * 30


def test_a_stream_is_one_batch_of_each_kind_and_reaches_what_adapts(loaded):
    task = ScenesShift(severities=(1,))
    items = task.items(32)
    batches = task.batches(loaded, items, 4)
    assert [{items[i].kind for i in batch} for batch in batches] == [{"clean"}, {"noise 1"}, {"blur 1"}, {"contrast 1"}]
    stream = [items[i] for i in batches[1]]
    kept = []
    for _ in range(2):
        with torch.inference_mode(), vlmtok.compress(loaded.model, "tca:ratio=0.9:layers=1") as run:
            outcomes = task.answer(loaded, stream)
            assert run.memory().classes == len(SENTENCES)  # `zero_shot` told it the classes
            kept.append(run.state_dict())
    assert len(outcomes) == 8
    tokens = next(name for name in kept[0] if name.endswith("tokens"))
    assert kept[0][tokens].abs().sum() > 0
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    with torch.inference_mode(), vlmtok.compress(loaded.model, "tca:ratio=0.9:layers=1") as run:
        task.answer(loaded, [items[i] for i in batches[0]])
        assert not torch.equal(run.state_dict()[tokens], kept[0][tokens])


def test_trained_cross_tokens_reach_the_method(loaded, made):
    path = cross_tokens_of(loaded)
    assert path is not None and path.parent == made[0]
    pictures = [one.picture.draw() for one in gallery(0)[:2]]
    with torch.inference_mode(), vlmtok.compress(loaded.model, SPEC) as run:
        untrained = see(loaded, pictures)
        assert give_cross_tokens(loaded)
        assert all(value.abs().max() > 0 for value in run.parameters())
        assert not torch.equal(see(loaded, pictures), untrained)
        ScenesClip(cross_tokens=False).answer(loaded, ScenesClip().items(1))
    with vlmtok.compress(loaded.model, "tome:r=4"), torch.inference_mode():
        assert not give_cross_tokens(loaded)
        see(loaded, pictures)


def test_untrained_cross_tokens_stay_where_it_is_asked(loaded):
    items = ScenesClip().items(1)
    for wanted in (True, False):
        with torch.inference_mode(), vlmtok.compress(loaded.model, SPEC) as run:
            ScenesClip(cross_tokens=wanted).answer(loaded, items)
            assert any(value.abs().max() > 0 for value in run.parameters()) == wanted


def test_models_that_read_no_sentences_are_refused():
    tower = vlmtok.load("timm:vit_tiny_patch16_224", random=True)
    for task in (ScenesClip(), ScenesShift()):
        with pytest.raises(UnsupportedModel, match="dual encoder"):
            task.check(tower)


def test_cross_tokens_of_another_width_are_refused(loaded, made, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    path = tmp_path / "cross_tokens.safetensors"
    save_file({"0.cross_image": torch.zeros(1, 2, 8), "0.cross_text": torch.zeros(1, 2, 16)}, path)
    monkeypatch.setattr("vlmtok.evaluation.dual.cross_tokens_of", lambda _: path)
    with vlmtok.compress(loaded.model, SPEC), torch.inference_mode():
        with pytest.raises(ParameterError, match=r"cross_image must be \[1, 2, 32\]"):
            give_cross_tokens(loaded)
        see(loaded, [gallery(0)[0].picture.draw()])


def test_build_is_as_large_as_the_card_says():
    assert 1.3e6 < sum(p.numel() for p in build_clip().parameters()) < 1.6e6


# ---------------------------------------------------------------------- the checkpoint that ships
def test_the_shipped_checkpoint_is_small_and_knows_its_world_in_both_libraries():
    folder = ROOT / "vlmtok" / "data" / "scenes-clip"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6.3e6
    task = ScenesClip()
    items = task.items(60)
    for name in ("scenes-clip", f"open_clip:local-dir:{folder}"):
        loaded = vlmtok.load(name)
        assert cross_tokens_of(loaded) == folder / "cross_tokens.safetensors"
        with torch.inference_mode():
            batches = [[items[i] for i in rows] for rows in task.batches(loaded, items, 8)]
            outcomes = [outcome for asked in batches for outcome in task.answer(loaded, asked)]
        assert sum(outcome.quality for outcome in outcomes) >= 58


def test_plain_classification_drops_under_shift_and_needs_its_tokens():
    loaded, task = vlmtok.load("scenes-clip"), ScenesShift(severities=(3,))
    items = task.items(160)
    right = {}
    with torch.inference_mode():
        for rows in task.batches(loaded, items, 8):
            asked = [items[i] for i in rows]
            right[asked[0].kind] = sum(outcome.quality for outcome in task.answer(loaded, asked)) / len(asked)
        with vlmtok.compress(loaded.model, "random:layer=0:keep=0.1"):
            clean = [item for item in items if item.kind == "clean"]
            few = sum(outcome.quality for outcome in task.answer(loaded, clean)) / len(clean)
    assert right["clean"] > 0.97 and right["contrast 3"] < 0.6 and few < 0.6


@pytest.mark.parametrize("task", [ScenesClip, ScenesShift])
def test_untrained_cross_tokens_are_another_sweep(task):
    """A journal of the one is not gone on with by the other: questions of both have the same names."""
    trained, untrained = task(), task(cross_tokens=False)
    assert [item.id for item in trained.items(30)] == [item.id for item in untrained.items(30)]
    assert trained.settings != untrained.settings
