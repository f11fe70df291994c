"""Held-out questions of the checkpoint that ships, and what transformers answers under `vlmtok.compress`."""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from pathlib import Path

import torch
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.loading import DATA, EMBEDDED
from vlmtok.serving import plan
from vlmtok_vllm.client import Question
from vlmtok_vllm.pictures import data_url

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from tiny_llava.scenes import exam, render

FOLDER = str(DATA / EMBEDDED)
TOKENS, GRID = 144, (12, 12)


@lru_cache(maxsize=1)
def drawn(number=24):
    """(picture, question, right answer) of held-out scenes."""
    return [(render(scene), one.text, one.answer) for scene, one in exam(number, "http")]


def questions():
    return [Question(data_url(picture), text) for picture, text, _ in drawn()]


@lru_cache(maxsize=1)
def _loaded():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


@cache
def expected(spec, number, tokens=8):
    """Answers of transformers to the first questions, and the lengths of the prompts as the plan says."""
    model, processor = _loaded()
    answers, lengths = [], []
    gone = 0 if spec == "none" else TOKENS - plan(spec, adapter_for(model).layout()).count(TOKENS, TOKENS, GRID)
    for picture, text, _ in drawn()[:number]:
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        with torch.no_grad():
            if spec == "none":
                out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            else:
                with vlmtok.compress(model, spec):
                    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        length = inputs["input_ids"].shape[1]
        answers.append(processor.decode(out[0, length:], skip_special_tokens=True).strip())
        lengths.append(length - gone)
    return answers, lengths
