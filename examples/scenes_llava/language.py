"""The language model: a small Llama behind the projector, trained to answer from the frozen tower's tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_llava.language import Stage, begin, look_away
from tiny_llava.training import logger, mixed_precision, watch_attention
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from scenes_llava.album import KIND_NAMES
from scenes_llava.batches import Batch, draw, lay_out
from scenes_llava.store import Rows, Store, seeded
from scenes_llava.targets import GRIDS
from scenes_llava.tower import look


def answer_logits(llava: LlavaForConditionalGeneration, batch: Batch, features: Tensor) -> Tensor:
    """Logits `[B, Q * L, vocabulary]` at every place of the questions, of which those with a target are meant.

    Args:
        llava: The model.
        batch: Its rows.
        features: What the tower makes of all their patches, `[B, N, C]`.
    """
    embed = llava.get_input_embeddings()
    shown = features.gather(1, batch.kept[..., None].expand(-1, -1, features.shape[2]))
    visual = llava.model.multi_modal_projector(shown)
    rows = embed(batch.before.clamp(min=0)).expand(len(visual), -1, -1).to(visual.dtype)
    place = (batch.before < 0).nonzero()[:, 0]
    rows = rows.index_copy(1, place, visual)
    rows = torch.cat([rows, embed(batch.text).to(visual.dtype)], 1)
    hidden = llava.model.language_model(
        inputs_embeds=rows, attention_mask=batch.mask.to(rows.dtype), position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    return llava.lm_head(hidden[:, len(batch.before) :])


def _features(
    llava: LlavaForConditionalGeneration, store: Store, pages: list[Rows], grid: int, noise: torch.Generator | None
) -> Tensor:
    tower = llava.model.vision_tower
    return torch.cat([look(tower, store, rows, grid, noise) for rows in pages], 1)


def accuracy(
    llava: LlavaForConditionalGeneration, test: Store, keep: int | None = None, batch: int = 50
) -> dict[str, float]:
    """Share of held-out questions whose whole answer is right, by kind and over all.

    Args:
        llava: The model.
        test: Held-out pages.
        keep: How many visual tokens of a page are shown, drawn at random; None for all.
        batch: Pages at a time.
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for two in (False, True):
        pages = np.arange(len(test))
        pages = pages[test.album.arrays["two_kind"][:, 0] >= 0] if two else pages
        for first in range(0, len(pages), batch):
            rows = pages[first : first + batch]
            number = None if keep is None else keep * (1 + two)
            generator = seeded(test.device, 5, first)
            made, shown = lay_out(test, rows, GRIDS[0], two, number, True, generator, every=False)
            with torch.no_grad(), mixed_precision(test.device):
                best = answer_logits(llava, made, _features(llava, test, shown, GRIDS[0], None)).argmax(-1)
            fits = ((best == made.targets) | (made.targets == -100)).unflatten(1, (made.kinds.shape[1], -1)).all(-1)
            for kind, fit in zip(made.kinds.flatten().tolist(), fits.flatten().tolist()):
                if kind >= 0:
                    for name in (KIND_NAMES[kind], "all"):
                        asked[name] += 1
                        right[name] += fit
    return {name: right[name] / asked[name] for name in sorted(asked)}


def train_stage(
    llava: LlavaForConditionalGeneration,
    store: Store,
    test: Store,
    work: Path,
    stage: Stage,
    seed: int,
    log_every: int = 250,
) -> LlavaForConditionalGeneration:
    """Trains projector and decoder, or goes on with it.

    Args:
        llava: The model; its tower stays as it is.
        store: Training pages.
        test: Held-out pages for the curve in the log.
        work: Folder of the training's state.
        stage: What to do.
        seed: Seed of the batches.
        log_every: Steps between two measurements, at which the state is saved as well.

    Returns:
        The model, on its device.
    """
    device = store.device
    optimizer, progress = begin(llava, work, stage, device)
    llava.model.vision_tower.eval()
    layers = llava.model.language_model.layers
    number = len(layers)  # stages of other depths see other batches
    while progress.step < stage.steps:
        made, pages, grid = draw(store, (seed, number, progress.step), stage.batch, stage.whole)
        features = _features(llava, store, pages, grid, seeded(device, seed, number, progress.step, 2))
        with mixed_precision(device), watch_attention(layers[i].self_attn for i in stage.guided) as weights:
            logits = answer_logits(llava, made, features)
        loss = F.cross_entropy(logits.float().flatten(0, 1), made.targets.flatten())
        away = look_away(weights, made, 0) if weights else torch.zeros((), device=device)
        optimizer.step(loss + stage.guidance * away, progress.step)
        progress.step += 1
        if progress.step % log_every == 0 or progress.step == stage.steps:
            scores = accuracy(llava, test)
            report = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
            logger.info(
                "%s: step %d/%d, %.0f s, loss %.3f, away %.3f, %s",
                *(stage.name, progress.step, stage.steps, progress.spent["wall"], loss.item(), away.item(), report),
            )
            progress.save()
    return llava.eval()
