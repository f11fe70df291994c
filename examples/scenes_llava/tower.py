"""The vision tower: as tiny-llava's, it learns to say in every patch what stands there, at three picture sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_llava.tower import PATCH
from tiny_llava.training import Optimizer, Progress, logger, mixed_precision
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from scenes_llava.store import Rows, Store, seeded
from scenes_llava.targets import GRIDS, KINDS
from vlmtok.evaluation.scenes.painting import COLORS

_SIZES = {"kind": 1 + len(KINDS), "color": 1 + len(COLORS), "char": 11, "step": 4, "small": 2, "center": 2}
_GRID_SHARES = (0.7, 0.15, 0.15)


def tower_config() -> CLIPVisionConfig:
    """The tower's configuration: 8 layers of width 128, 576 patches and CLS."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=GRIDS[0] * PATCH,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def build_tower() -> CLIPVisionModel:
    """An untrained tower whose position embeddings start as smooth waves, so that they can be interpolated."""
    tower = CLIPVisionModel(tower_config())
    grid = GRIDS[0]
    axis = (torch.arange(grid) + 0.5) / grid
    frequencies = torch.pi * torch.linspace(1, 12, tower.config.hidden_size // 4)
    rows, columns = (t.flatten()[:, None] for t in torch.meshgrid(axis, axis, indexing="ij"))
    waves = [f(place * frequencies) for place in (rows, columns) for f in (torch.sin, torch.cos)]
    positions = next(p for name, p in tower.named_parameters() if "position_embedding" in name)
    with torch.no_grad():
        positions[1:] = 0.3 * torch.cat(waves, 1)
    return tower


class Heads(nn.Module):
    """Linear readers of the tower's tokens, thrown away after training."""

    def __init__(self, width: int, shown: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(_SIZES.values()) + 2)
        self.shown = nn.ModuleList(nn.Linear(width, shown) for _ in range(2))

    def read(self, patches: Tensor) -> dict[str, Tensor]:
        """Logits of every attribute, and `place`, the patch's own, `[B, G * G, ...]` each."""
        return dict(zip((*_SIZES, "place"), self.patch(patches.float()).split((*_SIZES.values(), 2), -1)))

    def loss(self, hidden_states: tuple[Tensor, ...], truth: dict[str, Tensor], shown: Tensor, grid: int) -> Tensor:
        """How far the last two layers are from what the pages hold.

        Patches are read where LLaVA reads them, one layer before the last; CLS there and at the end. Patches with
        marks, few beside the background, count as much as it.
        """
        read = self.read(hidden_states[-2][:, 1:])
        fair, on, printed = truth["fair"] > 0, truth["owner"] >= 0, truth["step"] > 0
        loss = hidden_states[-1].new_zeros((), dtype=torch.float32)
        for name in _SIZES:
            groups = [(on & fair, 1.0), (~on & fair, 0.3)]
            if name in ("char", "step"):
                groups = [(printed, 1.5), (fair & ~printed, 0.3)]
            if name == "center":
                groups = [(on, 0.3)]
            for chosen, weight in groups:
                errors = F.cross_entropy(read[name].flatten(0, 1), truth[name].flatten(), reduction="none")
                chosen = chosen.flatten()
                loss = loss + weight * (errors * chosen).sum() / chosen.sum().clamp(min=1)
        axis = (torch.arange(grid, device=loss.device) + 0.5) / grid
        place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
        loss = loss + 2 * F.smooth_l1_loss(read["place"], place.expand(len(shown), -1, -1))
        for head, hidden in zip(self.shown, hidden_states[-2:]):
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(head(hidden[:, 0].float()), shown)
        return loss

    def scores(self, hidden_states: tuple[Tensor, ...], truth: dict[str, Tensor], shown: Tensor) -> dict[str, float]:
        """Shares of right answers: of patches on marks, of printed digits by how fine, of CLS."""
        read = {name: value.argmax(-1) for name, value in self.read(hidden_states[-2][:, 1:]).items()}
        on, printed = truth["owner"] >= 0, truth["step"] > 0
        cells = printed & (truth["kind"] <= 6) & (truth["kind"] > 0)
        bars = printed & (truth["kind"] == 1 + KINDS.index("bar"))
        plates = printed & (truth["kind"] == 1 + KINDS.index("plate"))
        groups = {"kind": on, "color": on, "small": on & (truth["small"] > 0), "step": printed}
        found = {name: (read[name] == truth[name])[group].float().mean().item() for name, group in groups.items()}
        right = read["char"] == truth["char"]
        both = right & (read["kind"] == truth["kind"]) & (read["color"] == truth["color"])
        for name, group in {"plate digits": plates, "cells": cells, "bars": bars}.items():
            found[name] = both[group].float().mean().item()
        for i, (head, hidden) in enumerate(zip(self.shown, hidden_states[-2:])):
            found[f"cls{i - 2}"] = ((head(hidden[:, 0].float()) > 0) == (shown > 0)).float().mean().item()
        return found


def see(tower: CLIPVisionModel, pixels: Tensor) -> tuple[Tensor, ...]:
    """The tower's hidden states of pictures of any size, `[B, 1 + G * G, C]` each."""
    whole = pixels.shape[-1] == tower.config.image_size
    return tower(pixels, output_hidden_states=True, interpolate_pos_encoding=not whole).hidden_states


def train_tower(
    work: Path, store: Store, test: Store, seed: int, steps: int, batch: int, log_every: int = 250
) -> CLIPVisionModel:
    """Trains the tower, or goes on with it.

    Args:
        work: Folder of the training's state.
        store: Training pages.
        test: Held-out pages for the log.
        seed: Seed of weights, batches and noise.
        steps: Length of the training.
        batch: Pictures a step.
        log_every: Steps between two measurements, at which the state is saved as well.

    Returns:
        The trained tower, frozen.
    """
    torch.manual_seed(seed)
    device = store.device
    tower = build_tower().to(device)
    tower.set_attn_implementation("matmul")
    heads = Heads(tower.config.hidden_size, store.album.arrays["shown"].shape[1]).to(device)
    optimizer = Optimizer([tower, heads], steps, muon_rate=1.0e-2, adam_rate=3e-3, warmup=200, decay=0.7)
    progress = Progress(work / "tower.pt", {"tower": tower, "heads": heads}, optimizer)
    exam = np.arange(min(256, len(test)))
    while progress.step < steps:
        rng = np.random.default_rng((seed, 1, progress.step))
        rows = rng.choice(len(store), batch, replace=False)
        grid = int(rng.choice(GRIDS, p=_GRID_SHARES))
        pixels = store.pixels(rows, grid, seeded(device, seed, 2, progress.step))
        with mixed_precision(device):
            hidden_states = see(tower, pixels)
        loss = heads.loss(hidden_states, store.patches(rows, grid), store.rows("shown", rows), grid)
        optimizer.step(loss, progress.step)
        progress.step += 1
        if progress.step % log_every == 0 or progress.step == steps:
            scores = {}
            with torch.no_grad(), mixed_precision(device):
                hidden_states = see(tower, test.pixels(exam, GRIDS[0], None))
                scores = heads.scores(hidden_states, test.patches(exam, GRIDS[0]), test.rows("shown", exam))
            report = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
            spent = progress.spent["wall"]
            logger.info("tower: step %d/%d, %.0f s, loss %.3f, %s", progress.step, steps, spent, loss.item(), report)
            progress.save()
    return tower.eval().requires_grad_(False)


def look(tower: CLIPVisionModel, store: Store, rows: Rows, grid: int, noise: torch.Generator | None) -> Tensor:
    """What the projector gets of some pages, `[B, G * G, C]`."""
    with torch.no_grad(), mixed_precision(store.device):
        return see(tower, store.pixels(rows, grid, noise))[-2][:, 1:]
