"""The sample pictures that ship with the package: held-out scenes, drawn at a size one likes to look at."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

from PIL import Image

from tiny_llava.evaluate import Checkpoint
from tiny_llava.scenes import QUESTION_TYPES, Question, Scene, ask, render, sample_scene

logger = logging.getLogger("tiny_llava")
_SCALE = 4
_WIDE = (512, 384)
# Name and question type of each picture; the wide one shows that the processor's crop keeps the whole scene.
_SAMPLES = (
    ("where", "where"),
    ("color", "color"),
    ("what-is-at", "what is at"),
    ("digit", "digit"),
    ("count", "count"),
    ("wide", "shape"),
)


def draw_sample(scene: Scene, wide: bool = False) -> Image.Image:
    """Draws a scene at 384 px, or in the middle of a wider picture of the same background."""
    picture = render(scene, scale=_SCALE)
    if not wide:
        return picture
    canvas = Image.new("RGB", _WIDE, scene.background)
    canvas.paste(picture, ((_WIDE[0] - picture.width) // 2, 0))
    return canvas


def choose_samples() -> list[tuple[str, Scene, Question]]:
    """The file name, scene and question of each sample, drawn from the held-out scenes by name."""
    chosen = []
    for name, kind in _SAMPLES:
        if kind not in QUESTION_TYPES:
            raise ValueError(f"no question type {kind!r}; there are {', '.join(QUESTION_TYPES)}")
        attempt = 0
        while True:
            scene = sample_scene("held-out", "sample", name, attempt)
            question = ask(scene, kind, random.Random(f"sample:{name}:{attempt}"))
            # What is counted should be worth counting.
            enough = question is not None and len(question.cells) >= (2 if kind == "count" else 1)
            if enough and len(scene.things) >= 5:
                break
            attempt += 1
        assert question is not None
        chosen.append((f"{name}.png", scene, question))
    return chosen


def write_samples(checkpoint: Path, folder: Path) -> None:
    """Writes the pictures and `questions.json`, and checks that the checkpoint answers every question.

    Args:
        checkpoint: Folder of the finished model.
        folder: Where to write.

    Raises:
        ValueError: the checkpoint answers one wrongly.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = Checkpoint(checkpoint)
    rows = []
    for name, scene, question in choose_samples():
        picture = draw_sample(scene, wide=name.startswith("wide"))
        (answer,) = model.answer([picture], [question.text])
        if answer.strip() != question.answer:
            raise ValueError(f"{name}: {question.text!r} got {answer!r}, not {question.answer!r}")
        picture.save(folder / name, optimize=True)
        rows.append(
            {"picture": name, "question": question.text, "answer": question.answer, "cells": list(question.cells)}
        )
    (folder / "questions.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    logger.info("%d sample pictures in %s", len(rows), folder)
