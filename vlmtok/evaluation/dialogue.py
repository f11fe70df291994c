"""Batches of questions to a vision-language model through its chat template: without padding, over one or two turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.host_objects import cache_class
from ..errors import UnsupportedModel
from ..loading.models import Loaded
from ..loading.problems import taken_in


@dataclass(frozen=True)
class Dialogue:
    """Pictures and what is asked about them.

    Attributes:
        pictures: RGB.
        turns: earlier questions with the answers that they are given.
        question: the last one.
    """

    pictures: tuple[Image.Image, ...]
    turns: tuple[tuple[str, str], ...]
    question: str


def check_chat(loaded: Loaded) -> None:
    """Refuses a model that cannot be asked through a chat template.

    Raises:
        UnsupportedModel: it is a tower, or its processor has no template.
    """
    if not loaded.language:
        raise UnsupportedModel(f"{loaded.name} is a vision tower; this task asks vision-language models questions")
    if not getattr(loaded.processor, "chat_template", None):
        raise UnsupportedModel(f"the processor of {loaded.name} has no chat template to ask a question with")


def _text(loaded: Loaded, dialogue: Dialogue, turns: int, answer: bool = True) -> str:
    """The first `turns` turns as the template writes them, ready for the last one's answer."""
    asked = [*(question for question, _ in dialogue.turns), dialogue.question]
    messages: list[dict[str, Any]] = []
    for i in range(turns):
        pictures = [{"type": "image"}] * len(dialogue.pictures) if i == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": asked[i]}]})
        if i + 1 < turns:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": dialogue.turns[i][1]}]})
    return str(loaded.processor.apply_chat_template(messages, add_generation_prompt=answer))


def encode(loaded: Loaded, dialogues: Sequence[Dialogue], turns: int = 1) -> dict[str, Any]:
    """What ``generate`` takes for the first turns of some dialogues whose rows are of one length.

    Raises:
        LoadError: the processor cannot take a picture.
    """
    words = [_text(loaded, dialogue, turns) for dialogue in dialogues]
    pictures = [list(dialogue.pictures) for dialogue in dialogues]
    size = pictures[0][0].size
    made = taken_in(
        loaded.name, size, lambda: loaded.processor(images=pictures, text=words, padding=True, return_tensors="pt")
    )
    made = made.to(loaded.device, loaded.dtype)
    return {name: value for name, value in made.items() if name != "labels"}


def lengths(loaded: Loaded, dialogue: Dialogue) -> tuple[int, ...]:
    """What must be equal for dialogues to stand in one batch without padding: pictures, their sizes, tokens by turn."""
    tokenizer = loaded.processor.tokenizer
    sizes = [side for picture in dialogue.pictures for side in picture.size]
    counts = [
        len(tokenizer(_text(loaded, dialogue, turn), add_special_tokens=False)["input_ids"])
        for turn in range(1, len(dialogue.turns) + 2)
    ]
    return (len(dialogue.pictures), *sizes, *counts)


def answer(loaded: Loaded, dialogues: Sequence[Dialogue], max_new_tokens: int) -> list[str]:
    """Greedy answers to the last questions of dialogues of equal `lengths`.

    Earlier turns are asked first, under the same compression, and their answers are put on the cache that it left: what
    was dropped for the first question is gone for the second.
    """
    model: Any = loaded.model
    inputs = encode(loaded, dialogues)
    how = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if not dialogues[0].turns:
        return _decoded(loaded, model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :])
    first = model.generate(**inputs, **{**how, "max_new_tokens": 1}, return_dict_in_generate=True)
    cache, said = _cache_of(first), inputs["input_ids"]
    for turn in range(2, len(dialogues[0].turns) + 2):
        whole = encode_text(loaded, dialogues, turn, said)
        new = whole[:, said.shape[1] :]
        last = turn == len(dialogues[0].turns) + 1
        found = model.generate(
            input_ids=new,
            attention_mask=torch.ones_like(whole),
            return_dict_in_generate=True,
            **cache,
            **(how if last else {**how, "max_new_tokens": 1}),
        )
        cache, said = _cache_of(found), whole
    return _decoded(loaded, found.sequences[:, new.shape[1] :])


def _cache_of(output: Any) -> dict[str, Any]:
    """The cache that a generation leaves, known by its type, under the host's name for it, which `generate` takes."""
    kind = cache_class()
    return {name: value for name, value in output.items() if isinstance(value, kind)}


def encode_text(loaded: Loaded, dialogues: Sequence[Dialogue], turns: int, said: Tensor) -> Tensor:
    """Ids of a dialogue up to a turn, its beginning as it was said with the pictures' tokens in place, `[B, T]`.

    Raises:
        UnsupportedModel: the template writes the beginning of a dialogue otherwise once it goes on.
    """
    whole = encode(loaded, dialogues, turns)["input_ids"]
    if not torch.equal(whole[:, : said.shape[1]], said):
        raise UnsupportedModel(
            f"the chat template of {loaded.name} writes earlier turns otherwise when a dialogue goes on: a second turn "
            "on the kept cache cannot be asked"
        )
    return whole


def _decoded(loaded: Loaded, ids: Tensor) -> list[str]:
    return [text.strip() for text in loaded.processor.batch_decode(ids, skip_special_tokens=True)]
