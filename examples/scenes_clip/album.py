"""The training pictures, drawn once into memory-mapped files: pixels, what patches show, captions, their keys."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_llava.arrays import fill_arrays

from scenes_clip.words import LENGTH, tokenizer
from vlmtok.evaluation.scenes.captioned import SIDE, Captioned, Claim, sample
from vlmtok.evaluation.scenes.page import Split
from vlmtok.evaluation.scenes.painting import COLORS, SHAPES

PATCH = 8
GRID = SIDE // PATCH
GROUP = 4
"""Pictures that stand together: one and near-duplicates of it, so that a batch holds what is hard to tell apart."""
CAPTIONS = 4
_AXIS = (np.arange(GRID) + 0.5) * PATCH
_X, _Y = np.meshgrid(_AXIS, _AXIS)


def _columns() -> dict[str, tuple[tuple[int, ...], type]]:
    columns: dict[str, tuple[tuple[int, ...], type]] = {
        "pixels": ((SIDE, SIDE, 3), np.uint8),
        "seen": ((GRID * GRID, 3), np.int8),  # colour, shape and size of what a patch lies on, from 1; 0 for nothing
        "text": ((CAPTIONS, LENGTH), np.int8),  # token ids
        "says": ((CAPTIONS,), np.int64),  # key of each caption
        "full": ((), np.int64),  # key of captions that name everything
        "class": ((), np.int64),  # key of the class sentence, or a number that no caption has
    }
    return columns


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
    key = {"split": split, "seed": seed, "number": number}
    return Album(fill_arrays(folder, key, _columns(), _draw, workers))


def _draw(arrays: dict[str, np.ndarray], key: dict[str, Any], rows: range) -> None:
    split, seed = key["split"], key["seed"]
    for start in range(rows.start, rows.stop, GROUP):
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
