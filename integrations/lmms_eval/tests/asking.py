"""The tasks of these tests, lmms-eval asked in this process, and the same answers by hand."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlmtok
from vlmtok.harness import pictures
from vlmtok.loading import DATA, samples

FOLDER = str(DATA / "tiny-llava")

TALKS = """\
task: talks
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function talk.pictures
doc_to_text: question
doc_to_messages: !function talk.messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
  until: "ASSISTANT:"
  image_aspect_ratio: original
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
TALK = """\
from PIL import Image


def pictures(doc):
    return [Image.open(one).convert("RGB") for one in doc["pictures"]]


def messages(doc):
    seen = [{"type": "image", "url": one} for one in pictures(doc)]
    said = []
    for question, answer in doc["turns"]:
        said.append({"role": "user", "content": [*seen, {"type": "text", "text": question}]})
        said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        seen = []
    return [*said, {"role": "user", "content": [*seen, {"type": "text", "text": doc["question"]}]}]
"""


def talks() -> list[dict]:
    """Documents with one picture, with two, with an earlier turn, and with none; prompts of many lengths."""
    shown = samples()
    docs = []
    for one, next_one in zip(shown, [*shown[1:], shown[0]]):
        base = {"question": one.question, "answer": one.answer}
        docs.append({**base, "pictures": [str(one.path)], "turns": []})
        docs.append({**base, "pictures": [str(one.path), str(next_one.path)], "turns": []})
        docs.append({**base, "pictures": [str(one.path)], "turns": [["Which shape is blue?", "star"]]})
    return [*docs, {"question": "Which digit is shown?", "answer": "5", "pictures": [], "turns": []}]


def write(folder: Path) -> Path:
    """Both tasks."""
    pictures.write(folder)
    data = folder / "talks.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in talks()), "utf-8")
    (folder / "talk.py").write_text(TALK, "utf-8")
    (folder / "talks.yaml").write_text(TALKS.format(data=json.dumps(str(data))), "utf-8")
    return folder


@functools.cache
def manager(folder: Path) -> TaskManager:
    """The index of all tasks, which takes seconds to make."""
    return TaskManager("WARNING", include_path=str(folder), model_name="vlmtok")


def evaluate(folder: Path, tasks: list[str], arguments: str, batch: int = 1, **more) -> dict:
    """What lmms-eval makes of the model ``vlmtok``, by its Python interface."""
    return simple_evaluate(
        model="vlmtok", model_args=arguments, tasks=tasks, batch_size=batch, task_manager=manager(folder), **more
    )


def said(results: dict, task: str) -> list[str]:
    """Answers of a task, in the order of its documents."""
    rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    return [row["filtered_resps"][0] for row in rows]


def documents(task: str) -> list[dict]:
    """What is asked, as chat messages of transformers."""
    docs = talks()
    if task != "talks":
        docs = [{"question": s.question, "pictures": [str(s.path)], "turns": []} for s in samples()]
    made = []
    for doc in docs:
        parts = [{"type": "image", "image": Image.open(one).convert("RGB")} for one in doc["pictures"]]
        talk = []
        for question, answer in doc["turns"]:
            talk.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            talk.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            parts = []
        made.append([*talk, {"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}])
    return made


def by_hand(task: str, spec: str, batch: int) -> tuple[list[str], list]:
    """Answers and reports of `vlmtok.compress` on the checkpoint, written out."""
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    asked = documents(task)
    answers, reports = [], []
    with contextlib.nullcontext() if spec == "none" else vlmtok.compress(model, spec) as run:
        for first in range(0, len(asked), batch):
            talks = asked[first : first + batch]
            texts = [processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) for talk in talks]
            images = [part["image"] for talk in talks for turn in talk for part in turn["content"] if "image" in part]
            inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if run is not None and images:
                reports.append((run.report(), len(talks)))
    return answers, reports
