"""Prompts of text and pictures for any family, and how several of them become one left-padded batch.

A prompt is written as a pattern: a digit for so many text tokens, ``^`` for the first token of a sequence, any other
letter for one of the family's pictures or clips (a `Shot`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAD, BOS = 0, 1
WORDS = range(5, 900)
"""Ids that prompts take their text from."""
MARK = 970
"""Marks around and between pictures (from here on); they are text, with embeddings of their own."""
IMAGE, VIDEO, START, END, AUDIO = 990, 991, 992, 993, 995
VOCAB = 1000
FIRST_FRAME = 1
"""Part of a clip's first frame: 0 is for what shows the whole."""


@dataclass(frozen=True)
class Shot:
    """What one picture or clip adds to a prompt.

    Attributes:
        ids: marks, placeholders and separators, in order.
        arrays: what the host encodes, by argument; the first axis is the one along which a batch joins them.
        grids: (frames, rows, columns) of each run of placeholders, or empty where tokens have no grid.
        parts: for every placeholder 0 (thumbnail or only picture), 1.. (crops or frames) or -1 (separators).
        video: whether it is a clip.
        placeholder: id of its placeholders.
        crops: the same as `parts`, of a canvas that the host itself puts together.
    """

    ids: tuple[int, ...]
    arrays: Mapping[str, Tensor]
    grids: tuple[tuple[int, int, int], ...] = ()
    parts: tuple[int, ...] = ()
    video: bool = False
    placeholder: int = IMAGE
    crops: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.ids.count(self.placeholder)


@dataclass(frozen=True)
class Picture:
    """A picture or clip in a prompt.

    Attributes:
        columns: int64 `[N]`, its placeholders in the unpadded prompt.
        shot: what it shows.
    """

    columns: Tensor
    shot: Shot

    def runs(self) -> list[Tensor]:
        """Its columns, cut where other tokens stand between them."""
        breaks = (self.columns.diff() > 1).nonzero()[:, 0] + 1
        return list(self.columns.tensor_split(breaks.tolist()))


@dataclass(frozen=True)
class Prompt:
    """One row of a batch, without padding.

    Attributes:
        ids: int64 `[L]`.
        pictures: in order.
    """

    ids: Tensor
    pictures: tuple[Picture, ...] = ()

    @property
    def kinds(self) -> Tensor:
        """int64 `[L]`: 0 text, 1 placeholders of a picture, 2 of a clip."""
        kinds = torch.zeros_like(self.ids)
        for picture in self.pictures:
            kinds[picture.columns] = 2 if picture.shot.video else 1
        return kinds

    @property
    def owner(self) -> Tensor:
        """int64 `[L]`: which picture a token belongs to, -1 for text."""
        owner = torch.full_like(self.ids, -1)
        for index, picture in enumerate(self.pictures):
            owner[picture.columns] = index
        return owner

    def arrays(self) -> dict[str, list[Tensor]]:
        """What the host encodes, by argument, in order."""
        found: dict[str, list[Tensor]] = {}
        for picture in self.pictures:
            for name, value in picture.shot.arrays.items():
                found.setdefault(name, []).append(value)
        return found

    def then(self, more: Prompt, between: Tensor | None = None) -> Prompt:
        """This prompt, some ids, and another one behind."""
        start = self.ids if between is None else torch.cat([self.ids, between])
        moved = tuple(Picture(picture.columns + len(start), picture.shot) for picture in more.pictures)
        return Prompt(torch.cat([start, more.ids]), self.pictures + moved)


def write(pattern: str, shots: Mapping[str, Callable[[torch.Generator], Shot]], seed: int) -> Prompt:
    """The prompt of a pattern; the seed sets words and pixels."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    pictures = []
    length = 0
    for letter in pattern:
        if letter == "^":
            piece = torch.tensor([BOS])
        elif letter.isdigit():
            piece = torch.randint(WORDS.start, WORDS.stop, (int(letter),), generator=generator)
        else:
            shot = shots[letter](generator)
            piece = torch.tensor(shot.ids)
            pictures.append(Picture((piece == shot.placeholder).nonzero()[:, 0] + length, shot))
        parts.append(piece)
        length += len(piece)
    return Prompt(torch.cat(parts), tuple(pictures))


def concatenate(rows: list[list[Tensor]]) -> Tensor:
    """Joins what the rows of a batch bring to one argument."""
    return torch.cat([value for row in rows for value in row])


@dataclass(frozen=True)
class Batch:
    """Prompts of different lengths as one batch.

    Attributes:
        prompts: its rows.
        types: the argument that tells text from pictures, or None where the host takes none.
        prefix: whether type ids tell prompts from answers instead: all of a prompt is 0.
        join: joins the arrays of the rows, by argument; `concatenate` where nothing is said.
        extra: further arguments, from the prompts.
    """

    prompts: tuple[Prompt, ...]
    types: str | None = None
    prefix: bool = False
    join: Mapping[str, Callable[[list[list[Tensor]]], Tensor]] = field(default_factory=dict)
    extra: Callable[[tuple[Prompt, ...]], dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def alone(self, row: int) -> Batch:
        """One of its rows."""
        return Batch((self.prompts[row],), self.types, self.prefix, self.join, self.extra)

    def arrays(self) -> dict[str, Tensor]:
        """What the host encodes."""
        rows = [prompt.arrays() for prompt in self.prompts]
        found = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            joined = self.join.get(name, concatenate)([row.get(name, []) for row in rows])
            if joined.numel():  # nobody brings crops of a picture that is not cut
                found[name] = joined
        if found and self.extra is not None:
            found.update(self.extra(self.prompts))
        return found

    def inputs(self, mask: bool = True, side: str = "left") -> dict[str, Tensor]:
        """Arguments of `forward` and `generate`."""
        found = {"input_ids": padded([prompt.ids for prompt in self.prompts], side)}
        if mask:
            found["attention_mask"] = padded([torch.ones_like(prompt.ids) for prompt in self.prompts], side)
        if self.types is not None:
            kinds = [torch.zeros_like(p.ids) if self.prefix else p.kinds for p in self.prompts]
            found[self.types] = padded(kinds, side)
        return {**found, **self.arrays()}


def padded(rows: list[Tensor], side: str = "left") -> Tensor:
    """Rows of different lengths, `[L]` each, as `[B, longest]`, with zeros at one side."""
    longest = max(map(len, rows))
    filled = []
    for row in rows:
        space = row.new_zeros(longest - len(row))
        filled.append(torch.cat([space, row] if side == "left" else [row, space]))
    return torch.stack(filled)
