"""Exams about captioned pictures: lone things to classify, galleries of near-duplicates to search."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .captioned import Captioned, Claim, sample

GALLERY = 100
"""Pictures, and captions, of a gallery."""
_ALIKE = 5  # near-duplicates that stand together in a gallery


@dataclass(frozen=True)
class Shown:
    """A held-out picture and what is right about it.

    Attributes:
        id: Its name; another exam has the same.
        picture: Before it is drawn.
        caption: Holds of it and of no other picture of its gallery.
    """

    id: str
    picture: Captioned
    caption: str


def lone_pictures(number: int, seed: str = "exam") -> list[Shown]:
    """Held-out pictures of one large thing among clutter; their captions are the sentences of the classes."""
    drawn = (sample("held-out", 1, seed, i, lone=True)[0] for i in range(number))
    return [Shown(f"{seed}-lone-{i}", picture, picture.class_claim().text) for i, picture in enumerate(drawn)]


def gallery(which: int, seed: str = "exam") -> list[Shown]:
    """Gallery number `which`: 20 held-out pictures, each with four near-duplicates, and one caption of each."""
    return [
        Shown(f"{seed}-gallery-{which}-{i}", picture, text) for i, (picture, text) in enumerate(_fitting(which, seed))
    ]


def _fitting(which: int, seed: str) -> Iterator[tuple[Captioned, str]]:
    """Groups are taken where none of their captions holds of a picture that is there, nor the other way."""
    rng = random.Random(f"captions:{seed}:{which}")
    taken: list[tuple[Captioned, str]] = []
    claims: list[Claim] = []
    number = 0
    while len(taken) < GALLERY:
        group = sample("held-out", _ALIKE, seed, which, number)
        number += 1
        said = [picture.claim(rng) for picture in group]
        old = any(claim.holds(picture) for claim in claims for picture in group)
        if old or any(claim.holds(picture) for claim in said for picture, _ in taken):
            continue
        claims += said
        taken += [(picture, claim.text) for picture, claim in zip(group, said)]
    rng.shuffle(taken)
    yield from taken
