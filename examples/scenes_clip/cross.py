"""CrossGET's cross tokens, trained on the finished model at one budget, the model itself frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from scenes_llava.store import Store, seeded
from tiny_llava.training import Optimizer, Progress, logger
from torch import Tensor, nn
from transformers import CLIPModel

import vlmtok
from scenes_clip.model import contrast, draw_batch, matches, pixels_of, scale_of
from vlmtok.mergers.crossget import cross_loss, cross_tokens

MERGED = 36
"""Tokens merged in each of six layers: 40 of 256 are left behind the last."""
SPEC = f"crossget:rv={MERGED}:rl=0:guidance=cross"


def guidance_loss(clip: CLIPModel, run: vlmtok.Compression) -> Tensor:
    """CrossGET's loss of the last pass: the towers' cross tokens through the final norms and projections.

    As released, those of the vision tower go through the norm before the blocks.
    """
    pictures = _normed(cross_tokens(run.row(0, "vision")), clip.vision_model.pre_layrnorm)
    captions = _normed(cross_tokens(run.row(0, "text")), clip.text_model.final_layer_norm)
    return cross_loss(clip.visual_projection(pictures), clip.text_projection(captions))


def _normed(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """By the norm's weights; a call of the module itself would count as part of a pass."""
    return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def train_cross(clip: CLIPModel, work: Path, store: Store, seed: int, steps: int, batch: int) -> dict[str, Tensor]:
    """Trains the cross tokens with half of CLIP's loss and half of CrossGET's, or goes on with it.

    Args:
        clip: The model, frozen.
        work: Folder of the training's state.
        store: Training pictures.
        seed: Seed of batches and noise.
        steps: Length of the training.
        batch: Pictures a step.

    Returns:
        The state of the method, as `Compression.load_state_dict` takes it.
    """
    with vlmtok.compress(clip, SPEC) as run:
        learned = nn.ParameterDict({name.replace(".", "_"): value for name, value in run.named_parameters()})
        optimizer = Optimizer([learned], steps, adam_rate=3e-3, warmup=min(20, steps), decay=0.7)
        progress = Progress(work / "cross.pt", {"learned": learned}, optimizer)
        while progress.step < steps:
            rows, chosen = draw_batch(store, batch, np.random.default_rng((seed, 3, progress.step)))
            text, true = matches(store, rows, chosen)
            pixels = pixels_of(store, rows, seeded(store.device, seed, 4, progress.step))
            out = clip(input_ids=text, pixel_values=pixels)
            match = contrast(out.image_embeds, out.text_embeds, scale_of(clip), true)
            guide = guidance_loss(clip, run)
            optimizer.step((match + guide) / 2, progress.step)
            progress.step += 1
            if progress.step % 50 == 0 or progress.step == steps:
                spent = progress.spent["wall"]
                logger.info("cross tokens: step %d/%d, %.0f s, loss %.4f, guidance %.5f", progress.step, steps, spent,
                            match.item(), guide.item())  # fmt: skip
                progress.save()
        return {name: value.detach().clone() for name, value in run.state_dict().items()}
