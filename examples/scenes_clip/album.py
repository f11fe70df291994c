"""The training pictures, drawn once into memory-mapped files: pixels, what patches show, captions, their keys."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny_llava.training import logger

from scenes_clip.words import LENGTH, tokenizer
from vlmtok.evaluation.scenes.captioned import SIDE, Captioned, Claim, sample
from vlmtok.evaluation.scenes.page import Split
from vlmtok.evaluation.scenes.painting import COLORS, SHAPES

PATCH = 8
GRID = SIDE // PATCH
GROUP = 4
"""Pictures that stand together: one and near-duplicates of it, so that a batch holds what is hard to tell apart."""
CAPTIONS = 4
_CHUNK = 100 * GROUP
_AXIS = (np.arange(GRID) + 0.5) * PATCH
_X, _Y = np.meshgrid(_AXIS, _AXIS)


def _columns(number: int) -> dict[str, tuple[tuple[int, ...], type]]:
    columns: dict[str, tuple[tuple[int, ...], type]] = {
        "pixels": ((SIDE, SIDE, 3), np.uint8),
        "seen": ((GRID * GRID, 3), np.int8),  # colour, shape and size of what a patch lies on, from 1; 0 for nothing
        "text": ((CAPTIONS, LENGTH), np.int8),  # token ids
        "says": ((CAPTIONS,), np.int64),  # key of each caption
        "full": ((), np.int64),  # key of captions that name everything
        "class": ((), np.int64),  # key of the class sentence, or a number that no caption has
    }
    return {name: ((number, *shape), kind) for name, (shape, kind) in columns.items()}


@dataclass(frozen=True)
class Album:
    """Pictures of a split as arrays, `[N, ...]` each; see `_columns`."""

    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays["full"])


def draw_album(folder: Path, split: Split, seed: int, number: int, workers: int) -> Album:
    """Draws `number` pictures of a split, once; later calls open what is there.

    Args:
        folder: Gets the files, 50 KB a picture.
        split: Of the pictures.
        seed: Of pictures and captions.
        number: Of pictures, a multiple of `GROUP`.
        workers: Processes that draw.
    """
    done = folder / "done.json"
    key = {"split": split, "seed": seed, "number": number}
    columns = _columns(number)
    if not done.exists() or json.loads(done.read_text()) != key:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        for name, (shape, kind) in columns.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
        jobs = [(folder, split, seed, number, first) for first in range(0, number, _CHUNK)]
        with ProcessPoolExecutor(workers) as pool:
            for i, _ in enumerate(pool.map(_draw_chunk, jobs), 1):
                if i % 50 == 0:
                    logger.info("%s pictures: %d of %d", split, min(number, i * _CHUNK), number)
        done.write_text(json.dumps(key))
    return Album({name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in columns})


def _draw_chunk(job: tuple[Path, Split, int, int, int]) -> None:
    folder, split, seed, number, first = job
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _columns(number)}
    for start in range(first, min(first + _CHUNK, number), GROUP):
        rng = random.Random(f"captions:{split}:{seed}:{start}")
        for i, picture in enumerate(sample(split, GROUP, seed, start // GROUP), start):
            arrays["pixels"][i] = np.asarray(picture.draw())
            arrays["seen"][i] = see_patches(picture)
            claims = captions(picture, rng)
            arrays["text"][i] = tokenizer()(
                [claim.text for claim in claims], padding="max_length", max_length=LENGTH, return_tensors="np"
            ).input_ids
            arrays["says"][i] = [number_of(claim) for claim in claims]
            arrays["full"][i] = number_of(claims[0])
            arrays["class"][i] = number_of(picture.class_claim()) if len(picture.things) == 1 else -1 - i


def captions(picture: Captioned, rng: random.Random) -> list[Claim]:
    """Four captions of a picture; two of a lone thing's name its class alone."""
    full = [picture.claim(rng) for _ in range(CAPTIONS)]
    return full if len(picture.things) > 1 else [*full[: CAPTIONS // 2], *[picture.class_claim()] * (CAPTIONS // 2)]


def number_of(claim: Claim) -> int:
    """A caption's key as a number >= 0."""
    return int.from_bytes(hashlib.sha256(claim.key.encode()).digest()[:8], "big") >> 1


def see_patches(picture: Captioned) -> np.ndarray:
    """Colour, shape and size of the thing that each patch's centre lies on, from 1, or 0, `[256, 3]`."""
    seen = np.zeros((GRID, GRID, 3), np.int8)
    for thing in picture.things:
        inside = np.hypot(_X - thing.x, _Y - thing.y) <= max(thing.radius, PATCH / 2 * 2**0.5)
        seen[inside] = [1 + list(COLORS).index(thing.color), 1 + SHAPES.index(thing.shape), 1 + thing.small]
    return seen.reshape(-1, 3)
