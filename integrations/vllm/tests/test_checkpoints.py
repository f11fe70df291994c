"""The tiny checkpoints can tell right from wrong, and transformers' side is what transformers says."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import transformers_side
from checkpoints import FAMILIES, make, prompt
from pictures import pictures
from transformers_side import Answer, Asked, reference
from words import WORDS

PAIR = ("divprune:keep=8", "random:keep=8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's folder, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def apart(one: Answer, other: Answer) -> float:
    """How far the first token's log-probabilities differ."""
    return float((one.logprobs[0] - other.logprobs[0]).abs().max())


def test_no_two_pictures_are_alike():
    drawn = [picture.tobytes() for picture in pictures(24)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert sum(a != b for a, b in zip(one, other)) > 0.2 * len(one)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_always_the_same_and_complete(family, folders, tmp_path):
    folder = folders(family)
    assert digests(make(family, tmp_path)) == digests(folder)
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    processor = transformers.AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the picture ?"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt(family, 1)
    unknown = processor.tokenizer.unk_token_id
    assert unknown not in processor(text=prompt(family, 2, " ".join(WORDS)), images=pictures(2))["input_ids"][0]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_the_choice_of_their_tokens_matter(family, folders, tmp_path):
    first, second = pictures(2)
    asked = [Asked(prompt(family, 1), (first,)), Asked(prompt(family, 1), (second,))]
    asked.append(Asked(prompt(family, 2), (first, second)))
    found = reference(folders(family), [None, *PAIR], asked, tmp_path, steps=2)
    bare, both = found[None], [found[spec] for spec in PAIR]
    tokens = [len(answer.prompt) - len(bare[0].prompt) for answer in bare]
    assert 16 <= tokens[2] <= 150 and bare[0].rows == len(bare[0].prompt)
    assert apart(bare[0], bare[1]) > 1 and apart(bare[0], bare[2]) > 1
    for row, answers in enumerate(zip(bare, *both)):
        pruned = answers[1:]
        assert pruned[0].rows == pruned[1].rows < answers[0].rows == len(answers[0].prompt)
        assert all(apart(answers[0], other) > 0.1 for other in pruned) and apart(*pruned) > 0.1, row


def test_an_answer_is_that_of_transformers_greedy_search(folders):
    folder = folders("llava_clip")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    asked = Asked(prompt("llava_clip", 1), tuple(pictures(1)))
    found = transformers_side.answer(model, processor, None, asked, steps=4)
    ids = processor(text=asked.text, images=list(asked.pictures), return_tensors="pt")
    for step in range(4):  # by hand, without a cache
        with torch.no_grad():
            logits = model(**ids, use_cache=False).logits[0, -1]
        torch.testing.assert_close(found.logprobs[step], logits.log_softmax(-1), atol=1e-4, rtol=0)
        assert found.ids[step] == int(logits.argmax())
        ids["input_ids"] = torch.cat([ids["input_ids"], logits.argmax().view(1, 1)], 1)
        ids["attention_mask"] = torch.ones_like(ids["input_ids"])


def test_answers_are_kept_and_found_by_what_they_depend_on(folders, tmp_path, monkeypatch):
    folder, cache = folders("llava_clip"), tmp_path / "answers"
    first, second = (Asked(prompt("llava_clip", 1), (picture,)) for picture in pictures(2))
    reference(folder, [None], [first], cache, steps=1)
    runs: list[object] = []

    def run(*args, **kwargs):
        runs.append(args)
        return subprocess.CompletedProcess(args, 1, stderr="no such setting")

    monkeypatch.setattr(subprocess, "run", run)
    reference(folder, [None], [first], cache, steps=1)
    assert not runs
    for specs, asked, steps in ((["divprune:keep=8"], first, 1), ([None], second, 1), ([None], first, 2)):
        with pytest.raises(RuntimeError, match="no such setting"):
            reference(folder, specs, [asked], cache, steps)
    assert len(runs) == 3 and not list(cache.glob("job*"))


def test_a_setting_that_transformers_refuses_is_said(folders, tmp_path):
    asked = Asked(prompt("llava_clip", 1), tuple(pictures(1)))
    with pytest.raises(RuntimeError, match="UnknownMethod"):
        reference(folders("llava_clip"), ["nosuch:keep=8"], [asked], tmp_path)
