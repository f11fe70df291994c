"""Task `scenes-vqa` on the checkpoint that ships: batches, and a second turn on what the first one left."""

import pytest
import torch
import transformers
from support.hosts_of import cache_name, cache_of

import vlmtok
from vlmtok.errors import ParameterError, UnsupportedModel
from vlmtok.evaluation import dialogue
from vlmtok.evaluation.engine import evaluate
from vlmtok.evaluation.scenes import KINDS, exam
from vlmtok.evaluation.scenes_vqa import MAX_NEW_TOKENS, ScenesVqa
from vlmtok.lab.prompts import encode_prompt
from vlmtok.loading import Loaded, load

pytestmark = pytest.mark.filterwarnings("ignore:the hooks of")


@pytest.fixture(scope="module")
def model():
    return load("scenes-llava", device="cpu")


def answers(task, model, items, size):
    given: dict[int, object] = {}
    with torch.inference_mode():
        for batch in task.batches(model, items, size):
            assert len(batch) <= size
            given.update(zip(batch, task.answer(model, [items[i] for i in batch])))
    assert sorted(given) == list(range(len(items)))
    return [given[i] for i in range(len(items))]


def test_items_are_the_exam(model):
    task = ScenesVqa()
    items = task.items(14)
    assert [item.id for item in items] == [asked.id for asked in exam(14)] and [i.kind for i in items[:12]] == list(
        KINDS
    )
    assert len(ScenesVqa().items(None)) == 1200


@pytest.mark.parametrize("spec", [None, "divprune:keep=0.2"])
def test_batches_of_one_and_of_eight_answer_alike(model, spec):
    task = ScenesVqa(kinds=("table", "color", "second turn"))
    items = task.items(12)
    rows = task.batches(model, items, 8)
    assert 3 <= len(rows) < 12 and max(map(len, rows)) > 1
    for batch in rows:  # no row is padded
        given = dialogue.encode(model, [task._dialogue(items[i]) for i in batch])
        assert bool(given["attention_mask"].all()) and len({items[i].kind for i in batch}) == 1
    if spec is None:
        one, eight = answers(task, model, items, 1), answers(task, model, items, 8)
        assert sum(outcome.quality for outcome in one) >= 10
    else:
        with vlmtok.compress(model.model, spec):
            one, eight = answers(task, model, items, 1), answers(task, model, items, 8)
    assert one == eight
    assert all(outcome.quality == (outcome.answer == item.what.answer) for item, outcome in zip(items, one))


def test_answers_are_those_of_compress_by_hand(model, tmp_path):
    """A prompt, `generate`, the text behind it; through a sweep of all kinds at once."""
    found = evaluate(ScenesVqa(), model, "fastv", 0.25, limit=12, batch=8, baselines=False, folder=tmp_path)
    (row,) = (one for one in found.to_records() if one["method"] == "fastv" and one["kind"] == "all")
    right = asked = 0
    with vlmtok.compress(model.model, row["spec"]), torch.inference_mode():
        for item in ScenesVqa().items(11)[:10]:
            given = encode_prompt(model, item.what.pictures[0].draw(), item.what.question)
            said = model.model.generate(**given, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            text = model.processor.batch_decode(said[:, given["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            (told,) = ScenesVqa().answer(model, [item])
            assert told.answer == text.strip()
            right, asked = right + (text.strip() == item.what.answer), asked + 1
    kinds = [one for one in found.to_records() if one["method"] == "fastv" and one["kind"] in KINDS[:10]]
    assert sum(one["quality"] for one in kinds) == right and len(kinds) == asked == 10
    assert found.kinds == KINDS and 0 <= row["quality"] <= 1


# ---------------------------------------------------------------------- two turns
def two_turns(number=3):
    return ScenesVqa(kinds=("second turn",)).items(number)


def first_and_second(model, item):
    """By hand: the first turn's prefill, whose cache the second turn's tokens are put on."""
    task = ScenesVqa()
    asked = [task._dialogue(item)]
    (earlier,) = item.what.turns
    one = dialogue.encode(model, asked, 1)
    two = dialogue.encode(model, asked, 2)["input_ids"]
    text = model.processor.tokenizer.decode(two[0])
    parts = [part.lower().replace("?", " ?") for part in (*earlier, item.what.question)]
    assert [text.count(part) for part in parts] == [1, 1, 1] and sorted(parts, key=text.index) == parts
    length = one["input_ids"].shape[1]
    assert torch.equal(two[:, :length], one["input_ids"])
    held = cache_of(model.model(**one, use_cache=True))
    name, new, said = cache_name(model.model.forward), two[:, length:], []
    mask = torch.ones_like(two)
    for _ in range(MAX_NEW_TOKENS):
        out = model.model(input_ids=new, attention_mask=mask, **{name: held}, use_cache=True)
        new = out.logits[:, -1:].argmax(-1)
        said.append(int(new))
        mask = torch.cat([mask, mask[:, :1]], 1)
        if said[-1] == model.model.generation_config.eos_token_id:
            break
    return model.processor.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("spec", [None, "cdpruner:keep=0.1", "fastv:keep=0.2"])
def test_a_second_turn_is_on_the_cache_that_the_first_left(model, spec):
    items, task = two_turns(), ScenesVqa()
    with torch.inference_mode():
        if spec is None:
            assert [task.answer(model, [item])[0].answer for item in items] == [
                first_and_second(model, item) for item in items
            ]
            return
        with vlmtok.compress(model.model, spec):
            given = [task.answer(model, [item])[0].answer for item in items]
            assert given == [first_and_second(model, item) for item in items]


def test_another_exam_does_not_go_on_from_the_journal(model, tmp_path):
    """Its questions have the same names."""
    how = {"methods": [], "baselines": False, "limit": 1, "folder": tmp_path}
    evaluate(ScenesVqa(), model, **how)
    with pytest.raises(ParameterError, match="exam: None there, 'other' now"):
        evaluate(ScenesVqa(seed="other"), model, **how)


def test_what_was_dropped_for_the_first_question_stays_dropped(model):
    """CDPruner keeps what the first question asks about: the second turn encodes no picture and moves no column."""
    (item, *_) = two_turns()
    task, pictures, lengths = ScenesVqa(), [], []
    tower = model.model.model.vision_tower.register_forward_hook(lambda *given: pictures.append(1))
    last = model.model.model.language_model.layers[-1]

    def seen(module, args, kwargs):
        (held,) = (value for value in kwargs.values() if isinstance(value, transformers.Cache))
        hidden = args[0] if args else kwargs["hidden_states"]
        lengths.append((held.get_seq_length(len(model.model.model.language_model.layers) - 1), hidden.shape[1]))

    layer = last.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with vlmtok.compress(model.model, "cdpruner:keep=0.1"), torch.inference_mode():
            task.answer(model, [item])
    finally:
        tower.remove()
        layer.remove()
    asked = [task._dialogue(item)]
    one, two = (dialogue.encode(model, asked, turns)["input_ids"].shape[1] for turns in (1, 2))
    left = one - 576 + 58
    assert len(pictures) == 1
    assert lengths[0] == (0, left) and lengths[1] == (left, two - one)


def test_the_second_turn_depends_on_the_first(model):
    """Text-guided choice for another first question leaves other tokens, so the second answer's scores differ."""
    (item, *_) = two_turns()
    task = ScenesVqa()
    same = task._dialogue(item)
    other = dialogue.Dialogue(same.pictures, ((same.question, same.turns[0][1]),), same.question)
    kept = []
    for asked in (same, other):
        with vlmtok.compress(model.model, "fastv:keep=0.1", trace=True) as run, torch.inference_mode():
            model.model.generate(**dialogue.encode(model, [asked]), max_new_tokens=1, do_sample=False)
            kept.append(run.trace()[0].owner >= 0)
    assert kept[0].sum() == kept[1].sum() and not torch.equal(*kept)


def test_templates_that_rewrite_earlier_turns_are_refused(model, monkeypatch):
    (item, *_) = two_turns()
    plain = dialogue._text
    monkeypatch.setattr(dialogue, "_text", lambda m, d, turns, answer=True: ("so " * (turns > 1)) + plain(m, d, turns))
    with pytest.raises(UnsupportedModel, match="writes earlier turns otherwise"):
        ScenesVqa().answer(model, [item])


# ---------------------------------------------------------------------- wrong use
def test_what_cannot_be_asked(model):
    with pytest.raises(ParameterError, match="no kind 'colour'; there are color"):
        ScenesVqa(kinds=("color", "colour"))
    with pytest.raises(ParameterError, match="scenes-vqa has no kind"):
        ScenesVqa(kinds=())
    with pytest.raises(UnsupportedModel, match="tower is a vision tower"):
        ScenesVqa().check(Loaded("tower", torch.nn.Identity(), None, False))
    with pytest.raises(UnsupportedModel, match="no chat template"):
        ScenesVqa().check(Loaded("mute", model.model, object(), True))
