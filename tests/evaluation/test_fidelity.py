"""Task `fidelity`: through the engine, on shipped pictures, on a folder of odd files, and against answers by hand."""

import csv
import io
import json

import pytest
import torch
from families.build import FAMILIES, shared
from families.checkpoints import READERS, TEMPLATE, tokenizer
from PIL import Image
from support import checkpoints

import vlmtok
from vlmtok.errors import ParameterError, VlmtokWarning
from vlmtok.evaluation import fidelity
from vlmtok.evaluation.engine import evaluate
from vlmtok.evaluation.fidelity import Fidelity
from vlmtok.evaluation.task import task_named
from vlmtok.loading import Loaded, LoadError, load, samples

pytestmark = pytest.mark.filterwarnings("ignore:the hooks of")


def noise(size, seed=0):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)).byte()
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def folder(tmp_path):
    for number, size in enumerate(((96, 96), (120, 80), (64, 100))):
        noise(size, number).save(tmp_path / f"{number}.png")
    noise((96, 96)).convert("L").save(tmp_path / "grey.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return load(device="cpu")


def over(found):
    """Rows over all pictures, by the spec that ran and its budget."""
    return {(one["spec"], one["keep"]): one for one in found.to_records() if one["kind"] == "all"}


def test_the_uncompressed_model_is_at_one_with_itself_and_the_rest_is_not(model):
    rows = over(evaluate("fidelity", model, ["divprune"], [0.25, 0.1], repeats=1))
    bare = rows["", 1.0]
    assert (bare["quality"], bare["kl"], bare["top1"]) == (1.0, 0.0, 1.0) and bare["cosine"] == pytest.approx(
        1, abs=1e-6
    )
    small = rows["downsample", 0.25]
    assert small["quality"] < 1 and small["kl"] > 0.1 and small["cosine"] < 0.99 and small["visual_tokens"] == 36
    some, fewer = (
        next(row for (spec, k), row in rows.items() if "divprune" in spec and k == keep) for keep in (0.25, 0.1)
    )
    assert 0 < some["kl"] < fewer["kl"] and fewer["cosine"] < some["cosine"] < 1
    assert some["questions"] == len(samples())


def test_measures_are_means_over_repeats_as_the_quality(model, tmp_path):
    """Of what stands in the journal, answer by answer."""
    rows = over(evaluate(Fidelity(), model, ["random"], 0.1, repeats=4, limit=3, folder=tmp_path))
    (row,) = (row for (spec, _), row in rows.items() if spec.startswith("random"))
    lines = [json.loads(line) for line in (tmp_path / "fidelity.jsonl").read_text().splitlines()]
    told = [line for line in lines if line.get("way", "").startswith("random") and "id" in line]
    assert len(told) == 12 and row["repeats"] == 4 and len({line["measures"]["kl"] for line in told}) == 12
    assert row["quality"] == pytest.approx(sum(line["quality"] for line in told) / 12, rel=1e-5)
    for name in ("kl", "top1", "cosine"):
        assert row[name] == pytest.approx(sum(line["measures"][name] for line in told) / 12, rel=1e-5)


def test_the_table_shows_the_measures(model):
    """And no kinds, since pictures have none."""
    found = evaluate(Fidelity(), model, ["divprune"], 0.25, limit=2, baselines=False)
    table = found.table()
    assert list(table.head[3:8]) == ["all", "difference", "cosine", "kl", "top1"]
    assert table.rows[0][3:8] == ["100.0 %", "", "1", "0", "1"]
    (short,) = (row for (spec, _), row in over(found).items() if "divprune" in spec)
    assert table.rows[1][6] == f"{short['kl']:.3g}" != "0"


def test_quality_is_that_answers_agree(model):
    """Each picture's own question; answers as the model gives them by itself under the method."""
    task = Fidelity()
    items = task.items(None)
    task.check(model)
    assert task.batches(model, items, 8) == [[place] for place in range(len(items))]
    with vlmtok.compress(model.model, "todre:keep=0.1"):
        found = task.answer(model, items)
    seen = set()
    for one, outcome in zip(samples(), found, strict=True):
        image = vlmtok.loading.open_picture(one.path)
        told = vlmtok.compare(model, image, one.question, "todre:keep=0.1", rounds=0, max_new_tokens=16)
        assert outcome.quality == told.loyalty.same
        assert outcome.measures["top1"] <= 1 and outcome.measures["kl"] >= 0
        seen.add(outcome.quality)
    assert seen == {0.0, 1.0}


def test_a_sweep_that_goes_on_in_a_new_process_asks_the_uncompressed_model_again(model, folder, tmp_path_factory):
    """What it said is not in the journal; a twin of the model says it, compressed as the model may be."""
    place = tmp_path_factory.mktemp("journal")
    how = {"methods": ["divprune"], "repeats": 1, "baselines": False}
    with pytest.warns(VlmtokWarning, match="skipped"):
        first = evaluate(Fidelity(folder), model, keep=0.25, folder=place, **how)
        again = evaluate(Fidelity(folder), model, keep=[0.25, 0.1], folder=place, **how)
        fresh = evaluate(Fidelity(folder), model, keep=[0.25, 0.1], **how)
    assert again.to_csv() == fresh.to_csv() and len(first.to_records()) < len(again.to_records())


def test_files_that_are_none_are_named(model, folder):
    task = task_named("fidelity", images=folder, prompt="what color is the circle ?", max_new_tokens=2)
    with pytest.warns(VlmtokWarning, match=r"skipped empty\.png: .* is empty; skipped notes\.txt: ") as heard:
        found = evaluate(task, model, ["random"], 0.5, repeats=2, baselines=False)
    assert len([one for one in heard if "skipped" in str(one.message)]) == 1
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert {row["kind"] for row in rows} == {"picture", "all"} and {row["questions"] for row in rows} == {"4"}
    assert [item.id for item in task.items(2)] == ["0.png", "1.png"] and set(task.gallery.skipped) == set()


def test_answers_beyond_the_memory_are_asked_for_again(model, folder, monkeypatch):
    task = Fidelity(folder)
    with pytest.warns(VlmtokWarning):
        items = task.items(None)
    task.check(model)
    kept = task.answer(model, items)
    monkeypatch.setattr(fidelity, "KEPT_BYTES", 0)
    task.check(model)
    assert [one.measures for one in task.answer(model, items)] == [one.measures for one in kept] and not task._heard


# ---------------------------------------------------------------------- models
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_families(name, tmp_path):
    reader = READERS[name]
    made = reader.make(tokenizer(reader), chat_template=TEMPLATE.replace("IMAGE", reader.shown))
    loaded = Loaded(name, shared(name, FAMILIES[name].attentions[0]), made, True)
    noise((64, 64)).save(tmp_path / "a.png")
    found = over(evaluate(Fidelity(tmp_path, "what color ?", 3), loaded, ["divprune"], 0.5))
    (short,) = (row for (spec, _), row in found.items() if "divprune" in spec)
    assert found["", 1.0]["kl"] == 0 and short["kl"] > 0
    small = found["downsample", 0.5]
    assert small["kl"] > 0 if name == "qwen2_5_vl" else "whatever the picture's size" in small["problem"]


def test_towers_with_classes_and_with_embeddings(tmp_path):
    noise((60, 60)).save(tmp_path / "a.png")
    checkpoints.vit(tmp_path / "vit")
    pictures = Fidelity(tmp_path)
    loaded = load(str(tmp_path / "vit"), device="cpu")
    with pytest.warns(VlmtokWarning, match=r"skipped vit/config\.json"):
        rows = over(evaluate(pictures, loaded, ["tome"], 0.7))
    (short,) = (row for (spec, _), row in rows.items() if "tome" in spec)
    assert not pictures.language and short["kl"] > 0 and short["top1"] == short["quality"] and short["cosine"] < 1
    assert rows["downsample", 0.7]["kl"] > 0 and rows["", 1.0]["kl"] == 0
    clip = load("open_clip:ViT-S-32-alt", device="cpu", random=True)
    task = Fidelity()
    items = task.items(1)
    task.check(clip)
    (same,) = task.answer(clip, items)
    assert same.quality == 1 and set(same.measures) == {"cosine"}
    with vlmtok.compress(clip.model, "tome:r=4"):
        (other,) = task.answer(clip, items)
    assert other.measures["cosine"] < same.measures["cosine"]


def test_the_prompt(model, folder):
    """The user's, the picture's own, words that a shipped checkpoint knows, or a description."""
    other = Loaded("other", model.model, model.processor, True)
    with pytest.warns(VlmtokWarning):
        (first, *_) = Fidelity(folder).items(None)
    assert Fidelity(prompt="what ?")._asked(model, first) == "what ?"
    assert Fidelity()._asked(model, Fidelity().items(2)[1]) == samples()[1].question
    assert Fidelity()._asked(model, first) == samples()[0].question
    assert Fidelity()._asked(other, first) == "Describe this picture."


# ---------------------------------------------------------------------- wrong use
def test_what_cannot_be_asked(model, tmp_path):
    with pytest.raises(ParameterError, match="max_new_tokens=0"):
        Fidelity(max_new_tokens=0)
    with pytest.raises(ParameterError, match="the prompt is empty"):
        Fidelity(prompt=" ")
    with pytest.raises(LoadError, match="there is no folder"):
        evaluate(Fidelity(tmp_path / "nowhere"), model, ["random"], 0.5)
    with pytest.raises(LoadError, match="no picture in folder"):
        evaluate(Fidelity(tmp_path), model, ["random"], 0.5)
    with pytest.raises(ParameterError, match="takes a picture and no prompt"):
        evaluate(Fidelity(prompt="what ?"), load("open_clip:ViT-S-32-alt", device="cpu", random=True), ["tome"], 0.5)
    with pytest.raises(ParameterError, match="check.model. comes first"):
        task = Fidelity()
        task.answer(model, task.items(1))
    with vlmtok.compress(model.model, "random:keep=0.5"), pytest.raises(ParameterError, match="carries a compression"):
        Fidelity().check(model)


def test_other_pictures_or_another_prompt_do_not_go_on_from_the_journal(model, tmp_path):
    """Whose files have the same names."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        noise((96, 96), len(name)).save(tmp_path / name / "a.png")
    how = {"methods": [], "baselines": False, "folder": tmp_path / "journal"}
    evaluate(Fidelity(tmp_path / "one"), model, **how)
    evaluate(Fidelity(tmp_path / "one"), model, **how)
    for task, said in (
        (Fidelity(tmp_path / "two"), "images: .*one' there, .*two' now"),
        (Fidelity(tmp_path / "one", "what ?"), "prompt: None there, 'what .' now"),
        (Fidelity(tmp_path / "one", max_new_tokens=2), "max_new_tokens: None there, '2' now"),
    ):
        with pytest.raises(ParameterError, match=said):
            evaluate(task, model, **how)
