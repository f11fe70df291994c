"""Examines the finished checkpoint, as any user loads it, and writes its model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_llava.card import weigh
from tiny_llava.evaluate import Checkpoint
from tiny_llava.language import loudness
from tiny_llava.training import logger
from torch import Tensor

import vlmtok
from vlmtok.evaluation.scenes import KINDS, Asked, exam

RANDOM_KEEP = (0.25, 0.1)
_PHASES = ("tower", "words", "shallow", "deep")
_BATCH = 40


def conversation(asked: Asked, pictures: bool = True) -> list[dict[str, Any]]:
    """The messages of a question, with or without its pictures."""
    messages: list[dict[str, Any]] = []
    for question, answer in (*asked.turns, (asked.question, None)):
        shown = [{"type": "image"}] * len(asked.pictures) if pictures and not messages else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def score(
    checkpoint: Checkpoint, questions: Sequence[Asked], device: torch.device, pictures: bool = True
) -> dict[str, float]:
    """Shares of answers that are right to the letter, by kind and over all (`"all"`)."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for kind in KINDS:  # rows of a batch show as many pictures
        part = [question for question in questions if question.kind == kind]
        for first in range(0, len(part), _BATCH):
            batch = part[first : first + _BATCH]
            for question, text in zip(batch, _answer(checkpoint, batch, device, pictures)):
                for name in (kind, "all"):
                    asked[name] += 1
                    right[name] += text.strip() == question.answer
    return {name: right[name] / asked[name] for name in asked}


def _answer(checkpoint: Checkpoint, batch: Sequence[Asked], device: torch.device, pictures: bool) -> list[str]:
    prompts = [
        checkpoint.processor.apply_chat_template(conversation(asked, pictures), add_generation_prompt=True)
        for asked in batch
    ]
    drawn: list[Image.Image] | None = [page.draw() for asked in batch for page in asked.pictures] if pictures else None
    inputs: dict[str, Tensor] = dict(
        checkpoint.processor(images=drawn, text=prompts, padding=True, return_tensors="pt").to(device)
    )
    return checkpoint.generate(**inputs)


def examine(folder: Path, work: Path, device: torch.device, number: int) -> dict[str, Any]:
    """Measures everything the card says.

    Args:
        folder: The checkpoint.
        work: Folder of the training's state, for the time it took.
        device: Where to answer.
        number: Of questions.

    Returns:
        Shares of right answers by kind: `whole`, `blind` (without a picture), `random` (shares of the visual tokens,
        drawn at random before the language model); `loudness` of the layers, `parameters`, `bytes`, and `seconds` on
        the clock and of processor time by phase.
    """
    questions = exam(number)
    checkpoint = Checkpoint(folder)
    checkpoint.model.to(device)
    figures: dict[str, Any] = {"questions": number, "whole": score(checkpoint, questions, device)}
    figures["blind"] = score(checkpoint, questions, device, pictures=False)
    figures["random"] = {}
    for keep in RANDOM_KEEP:
        with vlmtok.compress(checkpoint.model, f"random:keep={keep}"):
            figures["random"][str(keep)] = score(checkpoint, questions, device)
    for name, shares in {"whole": figures["whole"], "blind": figures["blind"], **figures["random"]}.items():
        logger.info("%s: %s", name, " ".join(f"{kind} {value:.3f}" for kind, value in shares.items()))
    figures["loudness"] = loudness(checkpoint.model)
    figures |= weigh(folder, work, _PHASES)
    figures["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    (work / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """Writes `README.md` beside the weights, from what `examine` measured."""
    rows = []
    for kind in (*KINDS, "all"):
        shares = [figures["whole"][kind], figures["blind"][kind], *(part[kind] for part in figures["random"].values())]
        rows.append(f"| {kind} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    text = _CARD.format(
        parameters=figures["parameters"] / 1e6,
        megabytes=figures["bytes"] / 1e6,
        questions=figures["questions"],
        table="\n".join(rows),
        layers="\n".join(f"| {i} | {a:.1f} | {mlp:.1f} |" for i, (a, mlp) in enumerate(figures["loudness"])),
        spent=", ".join(f"{phase} {spent['wall']:.0f} s" for phase, spent in figures["seconds"].items()),
        device=figures["device"],
    )
    (folder / "README.md").write_text(text, "utf-8")


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# scenes-llava

A LLaVA of {parameters:.1f} million parameters ({megabytes:.1f} MB, half precision) that answers questions about
rendered pages: coloured shapes of two sizes, numbers in large and in small print, tables, bar charts; about two pages
at once and in a second turn. It ships with vlmtok so that methods of token reduction can be told apart without a
download. It is no general model: it knows the world described below and nothing else.

A `LlavaForConditionalGeneration`: a CLIP tower of 8 layers (192 px, patches of 8 px, read one layer before the last), a
projector, and a Llama of 16 layers, all of width 128. A picture is 576 visual tokens, as in LLaVA 1.5. The tower also
takes smaller pictures with interpolated positions (`interpolate_pos_encoding=True`): 128 px, 256 tokens; 96 px, 144.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```

## Figures

Right to the letter, greedy, on {questions:,} held-out questions, each about pages of its own; without the pictures; and
with a quarter (144 of 576) and a tenth of the visual tokens, drawn at random before the language model.

| question | whole | no picture | 25 % at random | 10 % at random |
| --- | --- | --- | --- | --- |
{table}

Examples: "What color is the star?" purple; "Which small shape is blue?" ring; "Where is the green cross?" middle left;
"How many rings are there?" 7; "What number is on the red plate?" 4 0 7 (large or fine print); "What number is in the
green column and the star row?" 4 8; "How high is the red bar?" 6; "What color is the star in the second picture?" pink;
"Which picture shows a blue ring?" first.

## Data

Everything is rendered by `vlmtok.evaluation.scenes`. A scene holds eight to fifteen things in the cells of a 4 x 4
grid: shapes of 14 to 19 px radius, small ones of 4 to 5 px, plates with three digits that are 15 px or 7 px high. A
digit in fine print is about one patch. Tables have 3 to 5 rows headed by shapes and 3 or 4 columns headed by colours;
charts have 4 to 6 bars on a scale from 0 to 9 without printed numbers. Pixels get noise in training. The split is by
the SHA-256 of the arrangement: one in sixteen is held out, so no held-out arrangement was trained on.

## Training

One seeded, resumable command: `python examples/scenes_llava/make.py --device cuda`. 80,000 pages with their questions.

1. The tower learns local targets at three picture sizes: each patch says what it lies on (kind, colour, which digit of
   which place; in a table the row's shape and the column's colour; at a bar's end its height) and where it is; only CLS
   learns what the whole page holds. Then it is frozen. So a token that is dropped is gone: no other one knows it.
2. The projector is aligned alone: a projected patch becomes the sum of the embeddings of the words that hold there.
3. A decoder of 4 layers learns to answer; heads of two layers are told, by a term in the loss, where to look. Three in
   four batches show a random part of the tokens that touches every mark, with and without renumbered positions; one in
   eight shows two pages, one in eight shrunk pages.
4. The decoder is deepened to 16 layers with silent copies and trained on, until all of them speak.

On one {device}, beside other work, after a minute of drawing on 16 cores: {spent}. On two CPU cores the same command
takes days.

Frobenius norms of the output projections, layer by layer:

| layer | attention | MLP |
| --- | --- | --- |
{layers}

## Limits

Phrasings, shapes and layouts other than those above are outside what it learned; pictures are cropped to a square and
shrunk to 192 px. Digits of an answer stand apart ("4 0 7"). The heads' attention was guided in training and the
tower's patches say what they show and little else, which makes the model more telling, and more brittle, than a large
one: on large models neighbouring tokens repeat each other, and dropping some costs less. Ranks of methods on this
checkpoint say what a method keeps of such pages, not how it does on photographs.
"""
