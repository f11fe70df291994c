"""Batches for the language model, laid out on the device: pages as the tower sees them, their questions behind.

Several questions stand behind one page, or two. Each sees the pages and itself only and its positions start right after
the pages, so that it is computed exactly as if it stood there alone, while the pages are paid for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tiny_llava.processor import BOS, PAD, USER
from torch import Tensor

from scenes_llava.album import KIND_NAMES
from scenes_llava.processor import ids
from scenes_llava.store import Rows, Store, seeded
from scenes_llava.targets import GRIDS
from vlmtok.evaluation.scenes.questions import ORDINALS

COUNT_SOFTNESS = 6.0
"""A head that counts n things pays them n / (n + 6) of its attention, so that the amount tells how many there are."""
_COUNTS = tuple(i for i, kind in enumerate(KIND_NAMES) if kind.startswith("count"))


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass, each a head, visual tokens and Q questions of L tokens.

    Attributes:
        before: Token ids up to the questions, -1 where a visual token stands, `[S]`.
        kept: Which of all visual tokens are shown, ascending, `[B, K]`.
        text: Token ids of the questions `[B, Q * L]`.
        targets: The next token where it belongs to an answer, else -100, `[B, Q * L]`.
        positions: Of the whole row `[B, S + Q * L]`.
        mask: Added to the attention logits `[B, 1, S + Q * L, S + Q * L]`.
        look: For rows that answer, the places before the questions that decide the answer, `[B, Q * L, S]`.
        share: How much of its attention such a row should pay them, -1 for other rows, `[B, Q * L]`.
        counting: Whether such a row counts, `[B, Q * L]`.
        kinds: Of the questions, numbers of `KIND_NAMES`, -1 for none, `[B, Q]`.
    """

    before: Tensor
    kept: Tensor
    text: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    look: Tensor
    share: Tensor
    counting: Tensor
    kinds: Tensor


def essential(patches: Sequence[dict[str, Tensor]], noise: Tensor) -> Tensor:
    """One patch of every mark, of every digit of its number and of every shape's centre, `[B, N]`.

    Args:
        patches: Of the pages, see `Store.patches`.
        noise: Decides which, uniform, `[B, N]`.
    """
    owner = torch.cat([page["owner"] + 100 * i * (page["owner"] >= 0) for i, page in enumerate(patches)], 1)
    step = torch.cat([page["step"] for page in patches], 1)
    center = torch.cat([(page["center"] > 0) & (page["counted"] > 0) for page in patches], 1)
    group = owner * 4 + step + 4  # 0 to 3 for the background
    best = noise.new_zeros(len(noise), 1000).scatter_reduce(1, group, noise, "amax")
    return ((best.gather(1, group) == noise) & (owner >= 0)) | center


def lay_out(
    store: Store,
    rows: Rows,
    grid: int,
    two: bool,
    keep: int | None,
    renumber: bool,
    generator: torch.Generator,
    every: bool = True,
) -> tuple[Batch, list[Rows]]:
    """Lays out pages and their questions.

    Args:
        store: The pages.
        rows: Which, `[B]`; for two pages the first of each pair.
        grid: Patches a side that they are shown with.
        two: Whether each row shows a page and its pair, with the questions about both.
        keep: How many visual tokens are shown, drawn at random; None for all.
        renumber: Whether the shown tokens get consecutive positions or keep those of the whole row.
        generator: Draws them.
        every: Whether what is drawn touches every mark.

    Returns:
        The batch, and the rows of the first and of the second pages.
    """
    device, prefix = store.device, "two" if two else "q"
    pages = [rows, store.album.pairs[rows]] if two else [rows]
    seen = [store.patches(page, grid) for page in pages]
    count = grid * grid * len(pages)
    order = torch.rand(len(rows), count, generator=generator, device=device)
    if keep is not None:
        score = order + essential(seen, order) if every else order
        kept = score.topk(keep, 1).indices.sort(1).values
        if two:  # a row's first tokens are its first page's in every row of the batch
            halves = [
                score[:, : count // 2].topk(keep // 2, 1).indices,
                score[:, count // 2 :].topk(keep // 2, 1).indices,
            ]
            kept = torch.cat([halves[0].sort(1).values, halves[1].sort(1).values + count // 2], 1)
    else:
        kept = torch.arange(count, device=device).expand(len(rows), -1)
    before, place = _before(kept.shape[1], len(pages), device)
    whole, whole_place = _before(count, len(pages), device)
    asked = {name: store.rows(f"{prefix}_{name}", rows) for name in _ASKED}
    number, length = asked["text"].shape[1:]
    text, targets = asked["text"].flatten(1), asked["target"].flatten(1)
    head = torch.arange(len(before), device=device).expand(len(rows), -1)
    if not renumber:  # every shown token where it would stand in the whole row
        marks = torch.arange(len(whole), device=device)[whole >= 0]
        head = head.clone()
        head[:, place] = whole_place[kept]
        head[:, before >= 0] = marks
    start = len(before) if renumber else len(whole)
    positions = torch.cat([head, (start + torch.arange(length, device=device).repeat(number)).expand(len(rows), -1)], 1)
    look, share, counting = _looks(asked, seen, kept, place, len(before))
    return Batch(
        before, kept, text, targets, positions, _mask(len(before), number, length, len(rows), device), look, share,
        counting, asked["kind"],
    ), pages  # fmt: skip


_ASKED = ("text", "target", "step", "answering", "deciding", "earlier", "turn", "kind", "which")


def _before(tokens: int, pages: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids up to the questions with -1 for `tokens` visual tokens, and where these stand."""
    row = [*ids(BOS), *ids(USER)]
    for i in range(pages):
        row += [*(ids(f"{ORDINALS[i]} picture:") if pages > 1 else ()), *[-1] * (tokens // pages)]
    found = torch.tensor(row, device=device)
    return found, (found < 0).nonzero()[:, 0]


def _mask(before: int, number: int, length: int, batch: int, device: torch.device) -> Tensor:
    owner = torch.full((before + number * length,), -1, device=device)
    owner[before:] = torch.arange(number, device=device).repeat_interleave(length)
    allowed = ((owner[:, None] == owner[None]) | (owner[None] == -1)).tril()
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(torch.bfloat16).min).expand(batch, 1, -1, -1)


def _looks(
    asked: dict[str, Tensor], seen: Sequence[dict[str, Tensor]], kept: Tensor, place: Tensor, before: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`look`, `share` and `counting` of a batch."""
    batch, number, length = asked["text"].shape
    deciding = torch.where(asked["turn"][..., None] > 0, asked["deciding"][:, :, None], asked["earlier"][:, :, None])
    deciding = deciding.flatten(1, 2)  # [B, Q * L, 9]
    which = asked["which"].repeat_interleave(length, 1)
    kinds = asked["kind"].repeat_interleave(length, 1)
    counting = torch.isin(kinds, torch.tensor(_COUNTS, device=kinds.device))
    step, answering = asked["step"].flatten(1), asked["answering"].flatten(1)
    owner = torch.cat([page["owner"] for page in seen], 1).gather(1, kept)
    steps = torch.cat([page["step"] for page in seen], 1).gather(1, kept)
    center = torch.cat([page["center"] for page in seen], 1).gather(1, kept) > 0
    page = kept // seen[0]["owner"].shape[1]
    found = torch.zeros(batch, number * length, kept.shape[1], dtype=torch.bool, device=kept.device)
    for i in range(deciding.shape[2]):
        found |= (deciding[..., i, None] == owner[:, None]) & (deciding[..., i, None] >= 0)
    found &= (which[..., None] == page[:, None]) & answering[..., None]
    found &= (step[..., None] == 0) | (step[..., None] == steps[:, None])
    found &= ~counting[..., None] | center[:, None]
    things = (deciding >= 0).sum(-1)
    share = torch.where(counting, things / (things + COUNT_SOFTNESS), 1.0)
    share = torch.where(answering & found.any(-1), share, -1.0)
    look = torch.zeros(batch, number * length, before, dtype=torch.bool, device=kept.device)
    look[:, :, place] = found
    return look, share, counting


def pad_id() -> int:
    """Of the token that fills up questions."""
    return ids(PAD)[0]


def draw(store: Store, seed: tuple[int, ...], batch: int, whole: float) -> tuple[Batch, list[Rows], int]:
    """The batch of a training step.

    A share of the batches shows whole pages, the others a part that touches every mark: so the model learns to care
    for what its tokens say, not for how many came or at which position. One in eight shows two pages, one in eight
    pages shrunk.

    Args:
        store: Training pages.
        seed: Of the step.
        batch: Number of pages.
        whole: Share of the batches that show whole pages.

    Returns:
        The batch, the rows of its pages, and their grid.
    """
    rng = np.random.default_rng(seed)
    two = rng.random() < 0.125
    scenes = np.flatnonzero(store.album.arrays["two_kind"][:, 0] >= 0) if two else np.arange(len(store))
    rows = rng.choice(scenes, batch // 2 if two else batch, replace=False)
    grid = int(rng.choice(GRIDS[1:])) if rng.random() < 0.125 else GRIDS[0]
    keep = None
    if rng.random() >= whole:
        keep = int(rng.choice((96, 144, 200, 288))) * (2 if two else 1)
        keep = None if keep >= grid * grid * (1 + two) else keep
    made, pages = lay_out(store, rows, grid, two, keep, bool(rng.random() < 0.5), seeded(store.device, *seed, 1))
    return made, pages, grid
