"""Examines the finished checkpoint and writes its model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tiny_llava.evaluate import Checkpoint, attention_to_asked, cls_attention, random_choice, score
from tiny_llava.language import loudness
from tiny_llava.scenes import QUESTION_TYPES, exam
from tiny_llava.training import logger

QUESTIONS = 2000
RANDOM_KEEP = 0.1
_ATTENTION_QUESTIONS = 200
_PHASES = ("tower", "alignment", "shallow", "deep")


def examine(folder: Path, work: Path) -> dict[str, Any]:
    """Measures everything the card says, through the public interface of transformers.

    Args:
        folder: The checkpoint.
        work: Folder of the training's state, for the time it took.

    Returns:
        Shares of right answers by question type: `whole`, `blind` (without a picture) and `random` (a tenth of the
        tokens, drawn at random before the language model); `attention` and `cls` layer by layer, `loudness` of the
        layers; `parameters`, `bytes`, and `seconds` on the clock and of processor time by phase.
    """
    questions = exam(QUESTIONS, "exam")
    checkpoint = Checkpoint(folder)
    choose = random_choice(RANDOM_KEEP)
    figures: dict[str, Any] = {
        "whole": score(questions, checkpoint.answer),
        "blind": score(questions, lambda pictures, texts: checkpoint.answer(None, texts)),
        "random": score(questions, lambda pictures, texts: checkpoint.answer_from(pictures, texts, choose)),
    }
    for name in ("whole", "blind", "random"):
        logger.info("%s: %s", name, " ".join(f"{kind} {value:.4f}" for kind, value in figures[name].items()))
    eager = Checkpoint(folder, attention="eager")
    figures["attention"] = attention_to_asked(eager, questions[:_ATTENTION_QUESTIONS])
    figures["cls"] = cls_attention(eager, questions[:_ATTENTION_QUESTIONS])
    figures["loudness"] = loudness(checkpoint.model)
    figures |= weigh(folder, work, _PHASES)
    (work / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def weigh(folder: Path, work: Path, phases: Sequence[str]) -> dict[str, Any]:
    """What a finished checkpoint takes, and what making it took.

    Args:
        folder: The checkpoint.
        work: Folder of the training's state.
        phases: Of the training, by the names of their files.

    Returns:
        `parameters`, `bytes`, and `seconds` on the clock and of processor time by phase.
    """
    states = {phase: torch.load(work / f"{phase}.pt", weights_only=True, map_location="cpu") for phase in phases}
    return {
        "parameters": sum(value.numel() for value in load_file(folder / "model.safetensors").values()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "seconds": {phase: state["spent"] for phase, state in states.items()},
    }


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """Writes `README.md` beside the weights, from what `examine` measured."""
    whole, blind, random = (figures[name] for name in ("whole", "blind", "random"))
    rows = [
        f"| {name} | {whole[name]:.1%} | {blind[name]:.1%} | {random[name]:.1%} |" for name in (*QUESTION_TYPES, "all")
    ]
    layers = [
        f"| {i} | {a['last']:.2f} | {a['text']:.2f} | {a['picture']:.2f} | {attention:.2f} | {mlp:.2f} |"
        for i, (a, (attention, mlp)) in enumerate(zip(figures["attention"], figures["loudness"]))
    ]
    cls = [f"| {i} | {c['share']:.2f} | {c['found']:.2f} |" for i, c in enumerate(figures["cls"])]
    spent = [
        f"| {phase} | {time['wall'] / 60:.0f} | {time['cpu'] / 60:.0f} |" for phase, time in figures["seconds"].items()
    ]
    total = sum(time["cpu"] for time in figures["seconds"].values()) / 60
    text = _CARD.format(
        parameters=figures["parameters"] / 1e6,
        megabytes=figures["bytes"] / 1e6,
        questions=QUESTIONS,
        table="\n".join(rows),
        lost=100 * (whole["all"] - random["all"]),
        area=figures["attention"][0]["area"],
        attention_questions=_ATTENTION_QUESTIONS,
        layers="\n".join(layers),
        cls_area=figures["cls"][0]["area"],
        cls="\n".join(cls),
        spent="\n".join(spent),
        total=total,
    )
    (folder / "README.md").write_text(text, "utf-8")


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-llava

A LLaVA of {parameters:.1f} million parameters ({megabytes:.1f} MB, half precision) that answers questions about little
pictures of coloured shapes and digits. It ships with vlmtok so that token reduction can be seen at work, and measured,
without a download. It is no general model: it knows the world described below and nothing else.

A `LlavaForConditionalGeneration`: a CLIP tower of 6 layers (96 px, patches of 8 px, read one layer before the last), a
projector, and a Llama of 16 layers, all of width 128. A picture is 144 visual tokens. The tower's tensors have the
names that vLLM's own LLaVA reads, and transformers too. It loads by `from_pretrained`:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```

## Figures

Right to the letter, greedy, on {questions:,} held-out questions, each about a scene of its own; without the picture;
and with a tenth of the visual tokens (14 of 144), drawn at random before the language model, which costs {lost:.1f}
points.

| question | whole picture | no picture | 14 random tokens |
| --- | --- | --- | --- |
{table}

Examples: "What color is the star?" purple; "Which shape is blue?" circle; "Which digit is red?" 7; "How many rings are
there?" 2; "Where is the green cross?" middle left; "What is at the top right?" pink 3.

## Data

Everything is rendered by `examples/tiny_llava/scenes.py`. A scene holds four to seven things in the cells of a 3 x 3
grid, each one of 6 shapes or 10 digits in one of 8 colours, of varying size and offset on a light or dark background;
pixels get noise in training. The split is by the SHA-256 of the arrangement (what stands in which cell): one in sixteen
is held out, so no held-out arrangement was trained on, whatever its sizes and colours of background. Counts go from 0
to 3, about equally often. The exam asks the six types in turn.

## Training

One seeded command, `python examples/tiny_llava/make.py`:

1. The tower learns local targets: each patch says what it lies on (kind, colour, offset to the centre) and where it is;
   only CLS learns what the whole picture holds. Then it is frozen. So a token that is dropped is gone: no other one
   knows it.
2. The projector is aligned alone: a projected patch on a thing becomes the sum of the embeddings of the words that hold
   there (colour, kind, "shape" or "digit", the two words of its place), and the one nearest to a thing's centre also
   says "thing".
3. A decoder of 4 layers learns to answer. Heads of two layers are told, by a term in the loss, where to look. Most
   batches show a random part of the tokens that touches every thing, with and without renumbered positions.
4. The decoder is deepened to 16 layers with silent copies and trained on, until all of them speak.

Minutes on two CPU cores that other programs used as well:

| phase | on the clock | processor time |
| --- | --- | --- |
{spent}

In all {total:.0f} minutes of processor time; storing the tower's features of 30,000 scenes and the exam come on top.

## Attention

For each decoder layer, on {attention_questions} questions: the share of the picture's attention that the last prompt
row and all text rows put on the asked things (which cover {area:.2f} of the picture), how much of its attention the
last row pays the picture at all, and the Frobenius norms of the layer's output projections.

| layer | last row, on the asked | text rows, on the asked | last row, on the picture | attention out | MLP out |
| --- | --- | --- | --- | --- | --- |
{layers}

For each tower layer, the share of CLS's attention that falls on things (which cover {cls_area:.2f} of the picture), and
the share of things that have a patch among the 14 with most of it.

| layer | on things | things found |
| --- | --- | --- |
{cls}

## Limits

Phrasings, colours, shapes and layouts other than those of `scenes.py` are outside what it learned. Things are about as
large as a cell of the grid; pictures are cropped to a square and shrunk to 96 px. The heads' attention was guided in
training, which makes it more telling than that of a large model: methods that trust attention look better here. Ranks
of methods on this checkpoint say what a method keeps of little pictures, not how it does on photographs.
"""
