"""The vision tower: a small CLIP trained to say, in every patch, what stands there.

Trained freely together with a language model, a tower may copy the whole picture into every token, and dropping tokens
would cost nothing. So the tower learns local targets first and is frozen then: a patch knows the thing it lies on and
its own row and column. Only CLS learns what the whole picture holds, which makes its attention fall on the things.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from tiny_llava.scenes import COLORS, KINDS, SIZE, Scene, Split, add_noise, render, sample_scene
from tiny_llava.training import Optimizer, Progress, logger, mixed_precision

PATCH = 8
GRID = SIZE // PATCH
TOKENS = GRID * GRID
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_COLOR_NAMES = tuple(COLORS)
_IGNORED = -100
_AXIS = (np.arange(GRID) + 0.5) * PATCH
_COLUMNS, _ROWS = np.meshgrid(_AXIS, _AXIS)


def tower_config() -> CLIPVisionConfig:
    """The tower's configuration: 6 layers of width 128, 144 patches and CLS."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def build_tower() -> CLIPVisionModel:
    """An untrained tower whose position embeddings start as sines and cosines of row and column."""
    tower = CLIPVisionModel(tower_config())
    frequencies = torch.linspace(0, torch.pi, tower.config.hidden_size // 4 + 1)[1:]
    rows, columns = (t.flatten()[:, None].float() for t in torch.meshgrid(*[torch.arange(GRID)] * 2, indexing="ij"))
    waves = [f(axis * frequencies) for axis in (rows, columns) for f in (torch.sin, torch.cos)]
    positions = next(p for name, p in tower.named_parameters() if "position_embedding" in name)
    with torch.no_grad():
        positions[1:] = 0.5 * torch.cat(waves, 1)
    return tower


def normalise(pixels: np.ndarray) -> Tensor:
    """What the picture processor does to `uint8` pixels `[B, 96, 96, 3]`: `[B, 3, 96, 96]` floats."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def inside(scene: Scene, margin: float = 0.0) -> np.ndarray:
    """Which thing each patch centre lies on: its index, or -1, `[144]`; `margin` widens things by that many pixels."""
    owner = np.full((GRID, GRID), -1)
    for i, t in enumerate(scene.things):
        owner[np.hypot(_COLUMNS - t.x, _ROWS - t.y) <= t.r + margin] = i
    return owner.ravel()


def find_cells(scene: Scene) -> np.ndarray:
    """The cell of the thing that each patch centre lies on, or -1, `[144]`."""
    return np.array([*(thing.cell for thing in scene.things), -1])[inside(scene)]


def find_centres(scene: Scene) -> np.ndarray:
    """Which patches are the nearest to the centre of a thing, one for each, `[144]` booleans."""
    nearest = np.zeros(TOKENS, bool)
    for t in scene.things:
        nearest[np.argmin(np.hypot(_COLUMNS - t.x, _ROWS - t.y))] = True
    return nearest


def local_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every patch must say.

    Returns:
        The kind and the colour under each patch `[144]`, 0 for background and -100 on the rim of a thing, where neither
        answer is fair; and the offset `[144, 2]` from the patch to its thing's centre, in patches (0 off the things).
    """
    owner, touched = inside(scene), inside(scene, margin=PATCH * 0.75)
    kind = np.where(touched >= 0, _IGNORED, 0)
    color, offset = kind.copy(), np.zeros((TOKENS, 2), np.float32)
    for i, t in enumerate(scene.things):
        mine = owner == i
        kind[mine] = 1 + KINDS.index(t.kind)
        color[mine] = 1 + _COLOR_NAMES.index(t.color)
        centres = np.stack([_COLUMNS.ravel(), _ROWS.ravel()], 1)[mine]
        offset[mine] = (np.array([t.x, t.y]) - centres) / PATCH
    return kind, color, offset


def global_targets(scene: Scene) -> np.ndarray:
    """What CLS must say: which kinds and colours the picture shows and which cells are taken, `[16 + 8 + 9]`."""
    present = np.zeros(len(KINDS) + len(COLORS) + 9, np.float32)
    for t in scene.things:
        present[KINDS.index(t.kind)] = 1
        present[len(KINDS) + _COLOR_NAMES.index(t.color)] = 1
        present[len(KINDS) + len(COLORS) + t.cell] = 1
    return present


class Heads(nn.Module):
    """Linear readers of the tower's tokens, thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, 1 + len(KINDS))
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.offset = nn.Linear(width, 2)
        self.row = nn.Linear(width, GRID)
        self.column = nn.Linear(width, GRID)
        self.present = nn.ModuleList(nn.Linear(width, len(KINDS) + len(COLORS) + 9) for _ in range(2))

    def loss(self, hidden_states: tuple[Tensor, ...], scenes: list[Scene]) -> Tensor:
        """How far the tower's last two layers are from what the scenes hold.

        The patches are read where LLaVA reads them, one layer before the last; CLS there and at the end.
        """
        local = [local_targets(scene) for scene in scenes]
        device = hidden_states[-1].device
        kind, color, offset = (torch.from_numpy(np.stack(t)).to(device) for t in zip(*local))
        present = torch.from_numpy(np.stack([global_targets(scene) for scene in scenes])).to(device)
        place = torch.arange(TOKENS, device=device).expand(len(scenes), -1)
        patches = hidden_states[-2][:, 1:].float()
        on_thing = kind > 0
        loss = _cross_entropy(self.kind(patches), kind) + _cross_entropy(self.color(patches), color)
        loss += 0.2 * F.smooth_l1_loss(self.offset(patches)[on_thing], offset[on_thing])
        loss += 0.05 * _cross_entropy(self.row(patches), place // GRID)
        loss += 0.05 * _cross_entropy(self.column(patches), place % GRID)
        for head, hidden in zip(self.present, hidden_states[-2:]):
            loss += 0.3 * F.binary_cross_entropy_with_logits(head(hidden[:, 0].float()), present)
        return loss

    def scores(self, hidden_states: tuple[Tensor, ...], scenes: list[Scene]) -> dict[str, float]:
        """Shares of right answers, on patches that lie on a thing and for CLS of the last two layers."""
        local = [local_targets(scene) for scene in scenes]
        kind, color = (torch.from_numpy(np.stack(t)) for t in list(zip(*local))[:2])
        present = torch.from_numpy(np.stack([global_targets(scene) for scene in scenes])) > 0
        patches = hidden_states[-2][:, 1:].float().cpu()
        heads = self.cpu()
        right = {
            "kind": (heads.kind(patches).argmax(-1) == kind)[kind > 0],
            "digit": (heads.kind(patches).argmax(-1) == kind)[kind > len(KINDS) - 10],
            "color": (heads.color(patches).argmax(-1) == color)[kind > 0],
            "background": (heads.kind(patches).argmax(-1) == 0)[kind == 0],
        }
        for i, (head, hidden) in enumerate(zip(heads.present, hidden_states[-2:])):
            right[f"cls{i - 2}"] = (head(hidden[:, 0].float().cpu()) > 0) == present
        return {name: value.float().mean().item() for name, value in right.items()}


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=_IGNORED)


def draw_batch(split: Split, seed: int, first: int, number: int) -> tuple[list[Scene], Tensor]:
    """Scenes `first ...` of a split, and their noisy pictures `[B, 3, 96, 96]` as the tower gets them."""
    scenes = [sample_scene(split, seed, i) for i in range(first, first + number)]
    rng = np.random.default_rng((seed, first))
    pixels = np.stack([add_noise(np.asarray(render(scene)), rng) for scene in scenes])
    return scenes, normalise(pixels)


def train_tower(work: Path, seed: int, steps: int, device: torch.device, batch: int = 64) -> CLIPVisionModel:
    """Trains the tower, or goes on with it; every picture is a new one.

    Args:
        work: Folder of the training's state.
        seed: Seed of weights and data.
        steps: Length of the training.
        device: Where to train.
        batch: Pictures a step.

    Returns:
        The trained tower, on the CPU, frozen.
    """
    torch.manual_seed(seed)
    tower = build_tower().to(device)
    tower.set_attn_implementation("matmul")
    heads = Heads(tower.config.hidden_size).to(device)
    optimizer = Optimizer([tower, heads], steps, muon_rate=1.2e-2, adam_rate=4e-3, decay=0.7)
    progress = Progress(work / "tower.pt", {"tower": tower, "heads": heads}, optimizer)
    test_scenes, test_pixels = draw_batch("held-out", seed, 0, 256)
    while progress.step < steps:
        scenes, pixels = draw_batch("train", seed, progress.step * batch, batch)
        with mixed_precision(device):
            hidden_states = tower(pixels.to(device), output_hidden_states=True).hidden_states
        loss = heads.loss(hidden_states, scenes)
        optimizer.step(loss, progress.step)
        progress.step += 1
        if progress.step % 100 == 0 or progress.step == steps:
            with torch.no_grad(), mixed_precision(device):
                hidden_states = tower(test_pixels.to(device), output_hidden_states=True).hidden_states
                scores = heads.scores(hidden_states, test_scenes)
            heads.to(device)
            report = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
            logger.info("tower: step %d/%d, loss %.3f, %s", progress.step, steps, loss.item(), report)
            progress.save()
    logger.info("tower: %(wall).0f s on the clock, %(cpu).0f s of processor time", progress.spent)
    return tower.cpu().eval().requires_grad_(False)
