"""Families with processors of their own: batches of prompts with pictures of other sizes, two, and none, as one by one.

The checkpoints are those of the plug-in for vLLM: random weights, real processors.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import vlmtok
from vlmtok.errors import ParameterError
from vlmtok.harness.model import Vlmtok

sys.path.append(str(Path(__file__).parents[2] / "vllm" / "tests"))

import checkpoints

STEPS = 4


def drawn(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


DOCS = [
    ([drawn(48, 48, 0)], "what is in the picture ?"),
    ([drawn(40, 64, 1), drawn(64, 48, 2)], "is it a cat ?"),
    ([], "what is it ?"),
    ([drawn(64, 32, 3)], "what is there in the picture and what is it ?"),
    ([drawn(48, 48, 4), drawn(48, 48, 5)], "what ?"),
]


def messages(doc):
    pictures, question = DOCS[doc]
    seen = [{"type": "image", "url": one} for one in pictures]
    return [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]


def asked(family, folder, method, batch, **more):
    model = Vlmtok(pretrained=str(folder), method=method, batch_size=batch, **more)
    model.task_dict = {"docs": {"test": range(len(DOCS))}}
    settings = {"max_new_tokens": STEPS, "temperature": 0}
    requests = [SimpleNamespace(args=("", messages, settings, i, "docs", "test")) for i in range(len(DOCS))]
    found = model.generate_until(requests)
    model.clean()
    return [one.text for one in found], [one.token_counts.input_tokens for one in found]


def by_hand(family, folder, method):
    """One prompt after the other, as the model cards write it."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    answers, lengths = [], []
    with contextlib.nullcontext() if method == "none" else vlmtok.compress(model, method):
        for pictures, question in DOCS:
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            # As transformers' chats do: LLaVA-OneVision cuts pictures into crops where a prompt has one of them alone.
            inputs = processor(text=[text], images=[list(pictures)] if pictures else None, return_tensors="pt")
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
            lengths.append(inputs["input_ids"].shape[1])
            answers.append(processor.decode(out[0, lengths[-1] :], skip_special_tokens=True))
    return answers, lengths


FAMILIES = ("llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "idefics3")
"""One of each kind of processor; all of `checkpoints.FAMILIES` pass."""


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    return request.param, checkpoints.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("method", ["none", "divprune:keep=0.5"])
def test_a_batch_is_its_prompts_one_by_one(saved, method):
    hand = by_hand(*saved, method)
    assert len(set(hand[0])) > 2, "answers do not depend on what is asked"
    assert asked(*saved, method, 3) == hand


def test_bounds_on_pixels_are_those_of_the_processor(saved):
    family, folder = saved
    if "qwen" not in family:
        with pytest.raises(ParameterError, match="max_pixels cannot be set: .* no bounds on"):
            Vlmtok(pretrained=str(folder), method="none", max_pixels=1024)
        return
    whole, small = (asked(family, folder, "none", 3, **more)[1] for more in ({}, {"max_pixels": "1024"}))
    assert small[2] == whole[2]  # no picture
    assert all(a < b for i, (a, b) in enumerate(zip(small, whole)) if i != 2)
