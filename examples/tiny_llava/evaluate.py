"""The figures of the model card, measured through the public interface of transformers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from tiny_llava.scenes import Question, Scene, render
from tiny_llava.tower import TOKENS, inside

Exam = list[tuple[Scene, Question]]


class Checkpoint:
    """A saved checkpoint, loaded as any user loads it.

    Args:
        folder: The checkpoint.
        attention: Attention implementation; `"eager"` hands out the weights.
    """

    def __init__(self, folder: Path, attention: str = "sdpa") -> None:
        self.model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention)
        self.model.eval()
        self.processor: ProcessorMixin = AutoProcessor.from_pretrained(folder)

    def inputs(self, pictures: list[Image.Image] | None, questions: list[str]) -> BatchFeature:
        """A left-padded batch of prompts, one picture each, or none at all."""
        prompts = []
        for question in questions:
            parts = [{"type": "text", "text": question}]
            if pictures is not None:
                parts.insert(0, {"type": "image"})
            conversation = [{"role": "user", "content": parts}]
            prompts.append(self.processor.apply_chat_template(conversation, add_generation_prompt=True))
        return self.processor(images=pictures, text=prompts, padding=True, return_tensors="pt")

    def generate(self, **inputs: Tensor) -> list[str]:
        """Greedy answers to prompts given as ids or embeddings."""
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return self.processor.batch_decode(out[:, start:], skip_special_tokens=True)

    def answer(self, pictures: list[Image.Image] | None, questions: list[str]) -> list[str]:
        """Greedy answers to questions about pictures, or about nothing."""
        return self.generate(**self.inputs(pictures, questions))

    def answer_from(
        self, pictures: list[Image.Image], questions: list[str], choose: Callable[[Tensor], Tensor]
    ) -> list[str]:
        """Greedy answers from a part of the visual tokens, the rest dropped before the language model.

        Args:
            pictures: B pictures.
            questions: Their questions.
            choose: From projected tokens `[B, 144, C]` to the kept ones' indices, ascending, `[B, K]`.
        """
        inputs = self.inputs(pictures, questions)
        ids, padding = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            visual = torch.stack(list(self.model.get_image_features(inputs["pixel_values"]).pooler_output))
            kept = choose(visual)
            text = self.model.get_input_embeddings()(ids)
        rows, masks = [], []
        for b in range(len(ids)):
            first = int((ids[b] == self.model.config.image_token_id).nonzero()[0])
            rest = slice(first + TOKENS, None)
            rows.append(torch.cat([text[b, :first], visual[b, kept[b]], text[b, rest]]))
            masks.append(torch.cat([padding[b, : first + kept.shape[1]], padding[b, rest]]))
        return self.generate(inputs_embeds=torch.stack(rows), attention_mask=torch.stack(masks))


def score(exam: Exam, answer: Callable[[list[Image.Image], list[str]], list[str]], batch: int = 50) -> dict[str, float]:
    """Shares of answers that are right to the letter, by question type and over all (`"all"`)."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for part in _batches(exam, batch):
        given = answer([render(scene) for scene, _ in part], [question.text for _, question in part])
        for (_, question), text in zip(part, given):
            for name in (question.type, "all"):
                asked[name] += 1
                right[name] += text.strip() == question.answer
    return {name: right[name] / asked[name] for name in sorted(asked)}


def random_choice(keep: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A choice of `keep * 144` tokens, rounded half up, of each picture by a seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    number = int(keep * TOKENS + 0.5)

    def choose(visual: Tensor) -> Tensor:
        noise = torch.rand(visual.shape[:2], generator=generator)
        return noise.topk(number, dim=1).indices.sort(1).values

    return choose


def attention_to_asked(checkpoint: Checkpoint, exam: Exam, batch: int = 50) -> list[dict[str, float]]:
    """How much of the attention on the picture falls on the asked things, layer by layer.

    Args:
        checkpoint: Loaded with eager attention.
        exam: Questions; those without a thing to look at are left out.
        batch: Questions at a time.

    Returns:
        For each decoder layer: `last` and `text`, the share of the picture's attention mass that the last prompt row
        and all text rows behind the picture put on the patches of the asked things (mean over heads and questions);
        `picture`, the mass that the last row puts on the picture at all; `area`, the asked patches' share of it.
    """
    exam = [(scene, question) for scene, question in exam if question.cells]
    totals: list[defaultdict[str, float]] = []
    for part in _batches(exam, batch):
        inputs = checkpoint.inputs([render(scene) for scene, _ in part], [question.text for _, question in part])
        with torch.no_grad():
            attentions = checkpoint.model(**inputs, output_attentions=True).attentions
        asked = torch.from_numpy(np.stack([_asked(scene, question) for scene, question in part]))
        first = (inputs["input_ids"] == checkpoint.model.config.image_token_id).int().argmax(1)
        totals = totals or [defaultdict(float) for _ in attentions]
        for total, weights in zip(totals, attentions):
            for b in range(len(part)):
                seen = weights[b, :, first[b] + TOKENS :, first[b] : first[b] + TOKENS].mean(0)  # [T, 144]
                share = seen[:, asked[b]].sum(1) / seen.sum(1)
                total["last"] += share[-1].item()
                total["text"] += share.mean().item()
                total["picture"] += seen[-1].sum().item()
                total["area"] += asked[b].float().mean().item()
    return [{name: value / len(exam) for name, value in total.items()} for total in totals]


def cls_attention(checkpoint: Checkpoint, exam: Exam, batch: int = 50) -> list[dict[str, float]]:
    """How much of CLS's attention falls on the things, tower layer by tower layer.

    Returns:
        For each tower layer: `share`, the share of CLS's attention on patches that lie on a thing; `area`, those
        patches' share of the picture; `found`, the share of things that have a patch among the 14 with most attention.
    """
    totals: list[defaultdict[str, float]] = []
    for part in _batches(exam, batch):
        pixels = checkpoint.inputs([render(scene) for scene, _ in part], [""] * len(part))["pixel_values"]
        with torch.no_grad():
            attentions = checkpoint.model.model.vision_tower(pixels, output_attentions=True).attentions
        totals = totals or [defaultdict(float) for _ in attentions]
        for total, weights in zip(totals, attentions):
            rows = weights[:, :, 0, 1:].mean(1)
            top = rows.topk(round(0.1 * TOKENS), dim=1).indices.numpy()
            for (scene, _), row, best in zip(part, rows, top):
                owner = inside(scene)
                total["share"] += (row[torch.from_numpy(owner >= 0)].sum() / row.sum()).item()
                total["area"] += float((owner >= 0).mean())
                total["found"] += len(set(owner[best]) - {-1}) / len(scene.things)
    return [{name: value / len(exam) for name, value in total.items()} for total in totals]


def _asked(scene: Scene, question: Question) -> np.ndarray:
    things = [i for i, thing in enumerate(scene.things) if thing.cell in question.cells]
    return np.isin(inside(scene), things)


def _batches(exam: Exam, size: int) -> Iterator[Exam]:
    for first in range(0, len(exam), size):
        yield exam[first : first + size]
