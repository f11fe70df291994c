"""The model, the loss, and how it is trained: a CLIP whose patches also learn to say what they lie on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes_llava.store import Rows, Store, seeded
from tiny_llava.tower import MEAN, STD
from tiny_llava.training import Optimizer, Progress, logger, mixed_precision
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from scenes_clip.album import CAPTIONS, GRID, GROUP, PATCH
from scenes_clip.words import BOS, EOS, LENGTH, PAD, tokenizer, vocabulary
from vlmtok.evaluation.scenes.captioned import CLASSES, SIDE, TEMPLATE
from vlmtok.evaluation.scenes.painting import COLORS, SHAPES

WIDTH, TEXT_WIDTH, LAYERS, EMBEDDING = 128, 64, 6, 128
_SEEN = (1 + len(COLORS), 1 + len(SHAPES), 3)
_NOISE = 9  # levels of pixel noise are drawn below this
_LOCAL = 0.3
_SHARPEST = 100.0


def clip_config() -> CLIPConfig:
    """Six layers in both towers, as cross tokens need; 256 patches and CLS."""
    ids = {word: vocabulary().index(word) for word in (PAD, BOS, EOS)}
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu",
        "pad_token_id": ids[PAD],
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING)


def build_clip() -> CLIPModel:
    """An untrained model whose position embeddings start as smooth waves, so that they can be interpolated."""
    clip = CLIPModel(clip_config())
    axis = (torch.arange(GRID) + 0.5) / GRID
    frequencies = torch.pi * torch.linspace(1, 10, WIDTH // 4)
    rows, columns = (t.flatten()[:, None] for t in torch.meshgrid(axis, axis, indexing="ij"))
    waves = [f(place * frequencies) for place in (rows, columns) for f in (torch.sin, torch.cos)]
    positions = next(p for name, p in clip.vision_model.named_parameters() if "position_embedding" in name)
    with torch.no_grad():
        positions[1:] = 0.3 * torch.cat(waves, 1)
    return clip


def pixels_of(store: Store, rows: Rows, noise: torch.Generator | None) -> Tensor:
    """Pictures as the processor hands them over, `[B, 3, 128, 128]` floats.

    Args:
        store: The pictures.
        rows: Which.
        noise: Draws mild pixel noise and mild contrast; None adds none.
    """
    pixels = store.rows("pixels", rows).permute(0, 3, 1, 2).float()
    if noise is not None:
        each = (len(rows), 1, 1, 1)
        contrast = 0.8 + 0.3 * torch.rand(each, generator=noise, device=store.device)
        mean = pixels.mean((1, 2, 3), keepdim=True)
        strength = torch.randint(0, _NOISE, each, generator=noise, device=store.device)
        pixels = mean + contrast * (pixels - mean)
        pixels = pixels + (2 * torch.rand(pixels.shape, generator=noise, device=store.device) - 1) * strength
    mean, std = (torch.tensor(value, device=store.device)[:, None, None] for value in (MEAN, STD))
    return (pixels.round().clamp(0, 255) / 255 - mean) / std


def draw_batch(store: Store, batch: int, rng: np.random.Generator) -> tuple[Rows, np.ndarray]:
    """Rows of a batch, group by group, and which caption each takes."""
    groups = rng.choice(len(store) // GROUP, batch // GROUP, replace=False)
    rows = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
    return rows, rng.integers(CAPTIONS, size=len(rows))


def matches(store: Store, rows: Rows, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Token ids of captions `[B, L]`, and which caption is true of which picture, `[B pictures, B captions]`."""
    which = torch.from_numpy(chosen).to(store.device)
    every = torch.arange(len(rows), device=store.device)
    said = store.rows("says", rows)[every, which]
    true = (said == store.rows("full", rows)[:, None]) | (said == store.rows("class", rows)[:, None])
    return store.rows("text", rows)[every, which], true


def contrast(pictures: Tensor, captions: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss where several captions may be true of a picture: cross entropy to their even share, both ways."""
    logits = scale * F.normalize(pictures.float(), dim=-1) @ F.normalize(captions.float(), dim=-1).T
    losses = []
    for table, right in ((logits, true.float()), (logits.T, true.T.float())):
        losses.append(-(right / right.sum(1, keepdim=True) * table.log_softmax(1)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def scale_of(clip: CLIPModel) -> Tensor:
    """Factor of the cosines, at most 100 as in CLIP."""
    return clip.logit_scale.exp().clamp(max=_SHARPEST)


class Local(nn.Module):
    """A linear reader of patches, thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(WIDTH, sum(_SEEN))

    def loss(self, patches: Tensor, seen: Tensor) -> Tensor:
        """Cross entropy of colour, shape and size in every patch, patches on things counting five times.

        Args:
            patches: `[B, 256, C]`.
            seen: `[B, 256, 3]`, from 1; 0 for nothing.
        """
        weight = 1.0 + 4.0 * (seen[..., 0] > 0).float()
        parts = self.read(patches.float()).split(_SEEN, -1)
        flat = [(part.flatten(0, 1), seen[..., i].flatten()) for i, part in enumerate(parts)]
        errors = [F.cross_entropy(logits, truth, reduction="none") for logits, truth in flat]
        return torch.stack(errors).mean(0).mul(weight.flatten()).sum() / weight.sum()


def train_clip(work: Path, store: Store, test: Store, seed: int, steps: int, batch: int) -> CLIPModel:
    """Trains the model, or goes on with it.

    Args:
        work: Folder of the training's state.
        store: Training pictures.
        test: Held-out pictures for the log.
        seed: Seed of weights, batches and noise.
        steps: Length of the training.
        batch: Pictures a step, a multiple of `GROUP`.

    Returns:
        The trained model, frozen.
    """
    torch.manual_seed(seed)
    device = store.device
    clip, local = build_clip().to(device), Local().to(device)
    optimizer = Optimizer([clip, local], steps, muon_rate=1.0e-2, adam_rate=2e-3, warmup=min(150, steps), decay=0.6)
    progress = Progress(work / "clip.pt", {"clip": clip, "local": local}, optimizer)
    while progress.step < steps:
        rows, chosen = draw_batch(store, batch, np.random.default_rng((seed, 1, progress.step)))
        text, true = matches(store, rows, chosen)
        pixels = pixels_of(store, rows, seeded(device, seed, 2, progress.step))
        with mixed_precision(device):
            seen = clip.vision_model(pixels, output_hidden_states=True)
            pictures = clip.visual_projection(seen.pooler_output)
            captions = clip.text_projection(clip.text_model(text).pooler_output)
        loss = contrast(pictures, captions, scale_of(clip), true)
        near = local.loss(seen.hidden_states[-2][:, 1:], store.rows("seen", rows))
        optimizer.step(loss + _LOCAL * near, progress.step)
        progress.step += 1
        if progress.step % 100 == 0 or progress.step == steps:
            numbers = " ".join(f"{name} {value:.3f}" for name, value in scores(clip, test).items())
            spent = progress.spent["wall"]
            logger.info("clip: step %d/%d, %.0f s, loss %.3f, local %.3f, scale %.1f, %s", progress.step, steps, spent,
                        loss.item(), near.item(), scale_of(clip).item(), numbers)  # fmt: skip
            progress.save()
    with torch.no_grad():
        clip.logit_scale.copy_(scale_of(clip).log())
    return clip.eval().requires_grad_(False)


@torch.no_grad()
def scores(clip: CLIPModel, store: Store) -> dict[str, float]:
    """For the log: held-out pictures' classes, and captions found among a hundred both ways."""
    rows = np.arange(len(store) // 100 * 100 or len(store))
    pictures, captions = [], []
    for part in np.array_split(rows, max(1, len(rows) // 500)):
        pictures.append(clip.get_image_features(pixel_values=pixels_of(store, part, None)).pooler_output)
        captions.append(clip.get_text_features(store.rows("text", part)[:, 0]).pooler_output)
    pictures_, captions_ = (F.normalize(torch.cat(parts).float(), dim=-1) for parts in (pictures, captions))
    galleries = (
        (pictures_ @ captions_.T).unflatten(0, (-1, min(100, len(rows)))).unflatten(2, (-1, min(100, len(rows))))
    )
    inside = galleries.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [galleries, pictures, captions]
    right = torch.arange(inside.shape[1], device=inside.device)
    words = tokenizer()([TEMPLATE.format(*one) for one in CLASSES], padding="max_length", return_tensors="pt").input_ids
    classes = F.normalize(clip.get_text_features(words.to(store.device)).pooler_output.float(), dim=-1)
    seen = store.rows("seen", rows).amax(1)
    truth = (seen[:, 0] - 1) * len(SHAPES) + seen[:, 1] - 1
    lone = store.rows("class", rows) >= 0
    return {
        "class": ((pictures_ @ classes.T).argmax(1) == truth)[lone].float().mean().item(),
        "to text": (inside.argmax(2) == right).float().mean().item(),
        "to picture": (inside.argmax(1) == right).float().mean().item(),
    }
