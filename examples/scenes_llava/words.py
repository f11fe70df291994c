"""The projector's first training: each visual token is made to say what it shows, in words. See tiny-llava's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_llava.alignment import whiten
from tiny_llava.processor import IMAGE
from tiny_llava.training import Optimizer, Progress, logger
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from scenes_llava.processor import STEPS, index
from scenes_llava.store import Store, seeded
from scenes_llava.targets import GRIDS, KINDS
from scenes_llava.tower import look
from vlmtok.evaluation.scenes.page import COLUMNS, ROWS
from vlmtok.evaluation.scenes.painting import COLORS, DIGITS

_GRID_SHARES = (0.8, 0.1, 0.1)
_NAMES = {
    "kind": KINDS,
    "color": tuple(COLORS),
    "char": DIGITS,
    "step": STEPS,
    "small": ("small",),
    "row": ROWS,
    "column": COLUMNS,
    "counted": ("shape",),
}


def said(truth: dict[str, Tensor], table: Tensor) -> Tensor:
    """The sum of the embeddings of the words that hold in each patch, `[B, N, C]`.

    A patch on a mark says kind, colour and whether it is small; on a digit which one and which in its number; on a
    shape its place and "shape". The patch nearest to a shape's centre says "thing", once for each, so that shapes can
    be counted. All say "<image>", which tells them from the words of the question.
    """
    ids = index()
    total = table[ids[IMAGE]].expand(*truth["owner"].shape, -1)
    for name, words in _NAMES.items():
        rows = torch.cat([table.new_zeros(1, table.shape[1]), table[[ids[word] for word in words]]])
        total = total + rows[truth[name]]
    thing = (truth["center"] > 0) & (truth["counted"] > 0)
    return total + thing[..., None] * table[ids["thing"]]


def align(llava: LlavaForConditionalGeneration, store: Store, path: Path, seed: int, steps: int, batch: int) -> None:
    """Trains the projector alone on the words of each patch, or goes on with it.

    Args:
        llava: The model; only its projector changes.
        store: Training pages.
        path: File of the stage's state.
        seed: Seed of the batches.
        steps: Length of the stage.
        batch: Pictures a step.
    """
    projector, tower = llava.model.multi_modal_projector, llava.model.vision_tower
    table = llava.get_input_embeddings().weight.detach()
    first = look(tower, store, np.arange(min(256, len(store))), GRIDS[0], None).float()
    whiten(projector.linear_1, first.flatten(0, 1))
    optimizer = Optimizer([projector], steps, adam_rate=3e-3, decay=0.7)
    progress = Progress(path, {"projector": projector}, optimizer)
    while progress.step < steps:
        rng = np.random.default_rng((seed, 3, progress.step))
        rows = rng.choice(len(store), batch, replace=False)
        grid = int(rng.choice(GRIDS, p=_GRID_SHARES))
        truth = store.patches(rows, grid)
        features = look(tower, store, rows, grid, seeded(store.device, seed, 4, progress.step)).float()
        errors = (projector(features) - said(truth, table)).square().sum(-1)
        on, off = truth["owner"] >= 0, (truth["owner"] < 0) & (truth["fair"] > 0)
        loss = errors[on].mean() + 0.3 * errors[off].mean()
        optimizer.step(loss, progress.step)
        progress.step += 1
        if progress.step % 250 == 0 or progress.step == steps:
            logger.info("words: step %d/%d, loss %.4f", progress.step, steps, loss.item())
            progress.save()
