"""Batches for the language model: pictures as the frozen tower sees them, each with its questions behind it.

Several questions stand behind one picture. Each sees the picture and itself only and its positions start right after
the picture, so that it is computed exactly as if it stood there alone, while the picture is paid for once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerFast

from tiny_llava.processor import ASSISTANT, BOS, EOS, PAD, USER, build_tokenizer
from tiny_llava.scenes import Question, Scene, Split, ask_all, sample_scene
from tiny_llava.tower import TOKENS, draw_batch, find_cells, find_centres
from tiny_llava.training import logger, mixed_precision

PREFIX = 2  # <s> USER:
_CHUNK = 256
_SHORT_LENGTHS = (16, 20, 28, 40, 64)


@dataclass(frozen=True)
class Album:
    """Scenes of a split with what the tower makes of their pictures.

    Attributes:
        scenes: The scenes.
        features: Tokens for the projector, half precision `[N, 144, C]`.
        cells: The cell of the thing that each token lies on, -1 for none, `[N, 144]`.
        centres: Whether a token is the one nearest to a thing's centre, `[N, 144]`.
    """

    scenes: list[Scene]
    features: np.ndarray
    cells: np.ndarray
    centres: np.ndarray


def draw_album(tower: CLIPVisionModel, path: Path, split: Split, seed: int, number: int, device: torch.device) -> Album:
    """Draws `number` scenes and runs the tower on them; features lie in a memory-mapped file and are made once."""
    scenes = [sample_scene(split, seed, i) for i in range(number)]
    marks = [np.stack([find(scene) for scene in scenes]) for find in (find_cells, find_centres)]
    if not path.exists():
        logger.info("features of %d %s scenes", number, split)
        draft = path.with_suffix(".draft")
        shape = (number, TOKENS, tower.config.hidden_size)
        features = np.lib.format.open_memmap(draft, "w+", np.float16, shape)
        tower = tower.to(device)
        for first in range(0, number, _CHUNK):
            pixels = draw_batch(split, seed, first, min(_CHUNK, number - first))[1]
            with torch.no_grad(), mixed_precision(device):
                hidden = tower(pixels.to(device), output_hidden_states=True).hidden_states[-2]
            features[first : first + _CHUNK] = hidden[:, 1:].half().cpu().numpy()
        features.flush()
        draft.replace(path)
    return Album(scenes, np.load(path, mmap_mode="r"), *marks)


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)


def prefix_ids() -> tuple[int, ...]:
    """Ids of what stands before the picture, `PREFIX` of them."""
    return _ids(BOS) + _ids(USER)


@dataclass(frozen=True)
class Pack:
    """A batch of pictures, each followed by its questions and answers.

    Attributes:
        features: Tower tokens that are shown `[B, K, C]`.
        text: Token ids behind the picture `[B, T]`.
        targets: The next token where it belongs to an answer, else -100, `[B, T]`.
        positions: Positions of the whole row `[B, 2 + K + T]`.
        mask: Added to the attention logits `[B, 1, 2 + K + T, 2 + K + T]`.
        owner: For every text token, the index of its question in `questions`, or -1, `[B, T]`.
        look: For every row that answers, the picture's tokens that decide the answer `[B, T, K]`: those that show the
            asked thing, or the centres of the things to be counted.
        share: How much of its attention such a row should pay them, -1 for other rows, `[B, T]`.
        counting: Whether such a row counts things `[B, T]`.
        questions: All questions of the batch.
    """

    features: Tensor
    text: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    owner: Tensor
    look: Tensor
    share: Tensor
    counting: Tensor
    questions: list[Question]


def pack(
    album: Album,
    chosen: np.ndarray,
    questions: list[list[Question]],
    rng: random.Random,
    shown: np.ndarray | None,
    renumber: bool,
) -> Pack:
    """Lays out pictures and their questions for one forward pass.

    Args:
        album: Where the pictures are from.
        chosen: Which pictures of it, `[B]`.
        questions: The questions of each picture.
        rng: Decides which question marks are left out.
        shown: Which tokens are shown, ascending, `[B, K]`; None for all.
        renumber: Whether the shown tokens get consecutive positions or keep those of the whole picture.
    """
    batch = len(chosen)
    shown = np.broadcast_to(np.arange(TOKENS), (batch, TOKENS)) if shown is None else shown
    features = np.take_along_axis(album.features[chosen], shown[..., None], 1)
    cells, centres = (np.take_along_axis(marks[chosen], shown, 1) for marks in (album.cells, album.centres))
    kept = shown.shape[1]
    picture = np.arange(kept)[None].repeat(batch, 0) if renumber else shown
    start = PREFIX + (kept if renumber else TOKENS)
    assistant, end = _ids(ASSISTANT), _ids(EOS)
    rows: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = []
    for asked in questions:
        texts = [q.text.rstrip("?") if rng.random() < 0.15 else q.text for q in asked]
        rows.append([(_ids(text) + assistant, _ids(q.answer) + end) for text, q in zip(texts, asked)])
    length = max(sum(len(ask) + len(answer) - 1 for ask, answer in row) for row in rows)
    text = np.full((batch, length), _ids(PAD)[0])
    targets, owner = np.full((batch, length), -100), np.full((batch, length), -1)
    text_positions = np.zeros((batch, length), np.int64)
    counting = np.zeros((batch, length), bool)
    look, share = np.zeros((batch, length, kept), bool), np.full((batch, length), -1, np.float32)
    number = 0
    for b, row in enumerate(rows):
        at = 0
        for (ask, answer), question in zip(row, questions[b]):
            stop = at + len(ask) + len(answer) - 1
            text[b, at:stop] = ask + answer[:-1]
            targets[b, at + len(ask) - 1 : stop] = answer
            text_positions[b, at:stop] = start + np.arange(stop - at)
            owner[b, at:stop] = number
            answering = slice(at + len(ask) - 1, stop - 1)
            look[b, answering] = np.isin(cells[b], question.cells)
            if question.type == "count":
                look[b, answering] &= centres[b]
                counting[b, answering] = True
            share[b, answering] = question.attention
            at, number = stop, number + 1
    head = np.arange(PREFIX)[None].repeat(batch, 0)
    positions = torch.from_numpy(np.concatenate([head, PREFIX + picture, text_positions], 1))
    before = PREFIX + kept
    belongs = torch.full((batch, before + length), -2)
    belongs[:, before:] = torch.from_numpy(owner)
    allowed = (belongs[:, :, None] == belongs[:, None, :]) | (belongs[:, None, :] == -2)
    allowed &= torch.ones(before + length, before + length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill_(~allowed, torch.finfo(torch.bfloat16).min)[
        :, None
    ]
    return Pack(
        torch.from_numpy(features).float(),
        torch.from_numpy(text),
        torch.from_numpy(targets),
        positions,
        mask,
        torch.from_numpy(owner),
        torch.from_numpy(look),
        torch.from_numpy(share),
        torch.from_numpy(counting),
        [q for asked in questions for q in asked],
    )


def shorten(cells: np.ndarray, centres: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
    """Chooses `keep` tokens of each picture at random, among them the central one and another of every thing.

    Args:
        cells: The cell of the thing each token lies on, -1 for none, `[B, 144]`.
        centres: Which tokens are central, `[B, 144]`.
        keep: How many tokens, at least 14.
        rng: Decides.

    Returns:
        The chosen tokens, ascending, `[B, keep]`.
    """
    order = rng.random(cells.shape) - centres
    for row, cell in zip(order, cells):
        for i in range(9):
            mine = np.flatnonzero(cell == i)
            row[mine[np.argsort(row[mine])[:2]]] -= 1
    return np.sort(np.argsort(order, 1)[:, :keep], 1)


def training_pack(album: Album, seed: tuple[int, str], step: int, batch: int, whole: float, counts: int) -> Pack:
    """The batch of a step: a share of the batches shows whole pictures, the others a part that touches every thing.

    The shortened ones make the model care for what its tokens say, not for how many came or at which position; and they
    cost less.

    Args:
        album: Where the pictures are from.
        seed: Seed of a stage.
        step: Step of the stage.
        batch: Number of pictures.
        whole: Share of the batches that show whole pictures.
        counts: Questions about a number, to one of each other type.
    """
    questions_rng = random.Random(f"{seed}:{step}")
    rng = np.random.default_rng(questions_rng.getrandbits(64))
    chosen = np.sort(rng.choice(len(album.scenes), batch, replace=False))
    questions = [ask_all(album.scenes[i], questions_rng, counts) for i in chosen]
    shown = None
    if rng.random() >= whole:
        shown = shorten(album.cells[chosen], album.centres[chosen], int(rng.choice(_SHORT_LENGTHS)), rng)
    return pack(album, chosen, questions, questions_rng, shown, renumber=bool(rng.random() < 0.5))
