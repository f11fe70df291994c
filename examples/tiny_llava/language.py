"""The language model: a small Llama behind the projector, trained to answer from the frozen tower's tokens."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tiny_llava.packing import PREFIX, Album, Pack, pack, prefix_ids, training_pack
from tiny_llava.processor import BOS, EOS, IMAGE, PAD, vocabulary
from tiny_llava.scenes import ask_all
from tiny_llava.tower import TOKENS
from tiny_llava.training import Optimizer, Progress, logger, mixed_precision, watch_attention

ROPE_THETA = 1e6


class Looks(Protocol):
    """Which tokens decide an answer; see `Pack`, which is one."""

    look: Tensor
    share: Tensor
    counting: Tensor


@dataclass(frozen=True)
class Stage:
    """One stage of the language model's training.

    Attributes:
        name: Its name, of its file too.
        steps: Its length.
        muon_rate: Highest rate of the block matrices.
        adam_rate: Highest rate of norms and head; a tenth of it for projector and word embeddings.
        decay: Share of the steps in which the rates fall to zero.
        batch: Pictures a step.
        whole: Share of the batches that show whole pictures.
        counts: Questions about a number, to one of each other type.
        guided: Layers whose heads are told where to look.
        guidance: Weight of that in the loss.
    """

    name: str
    steps: int
    muon_rate: float = 1e-2
    adam_rate: float = 3e-3
    decay: float = 0.5
    batch: int = 32
    whole: float = 0.25
    counts: int = 3
    guided: tuple[int, ...] = ()
    guidance: float = 0.2


def llava_config(
    tower: CLIPVisionModel, depth: int, words: Sequence[str] | None = None, positions: int = 1024
) -> LlavaConfig:
    """The checkpoint's configuration, with a decoder of `depth` layers of width 128.

    Args:
        tower: Its vision tower.
        depth: Layers of the decoder.
        words: The tokenizer's, in order; by default those of tiny-llava.
        positions: That the decoder is made for.
    """
    vocabulary_ids = {word: i for i, word in enumerate(vocabulary() if words is None else words)}
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    text = LlamaConfig(
        vocab_size=len(vocabulary_ids),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        # Slow rotations: what a head looks for does not depend on how far away it stands.
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        **{name: vocabulary_ids[word] for name, word in special.items()},
    )
    return LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=vocabulary_ids[IMAGE],
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def build_llava(tower: CLIPVisionModel, config: LlavaConfig) -> LlavaForConditionalGeneration:
    """An untrained LLaVA around the trained, frozen tower."""
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    llava.model.vision_tower.requires_grad_(False)
    return llava


def initialise_attention(llava: LlavaForConditionalGeneration, gain: float = 1.0, copy: float = 0.1) -> None:
    """Starts every head as one that looks for tokens like its own and adds a little of what it finds.

    "Mimetic initialisation" (Trockman and Kolter, 2023) in its plainest form: W_Q = W_K and W_O = copy * W_V^T, all of
    them orthogonal. With words for tokens this is half of what answering takes.
    """
    with torch.no_grad():
        for layer in llava.model.language_model.layers:
            attention = layer.self_attn
            nn.init.orthogonal_(attention.q_proj.weight, gain)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.copy_(copy * attention.v_proj.weight.T)


def deepen(llava: LlavaForConditionalGeneration, order: tuple[int, ...]) -> LlavaForConditionalGeneration:
    """A deeper model that computes the same.

    Args:
        llava: The trained model.
        order: For every layer of the new decoder, the layer of the old one that it is a copy of, ascending. The last
            copy speaks; those before it start silent, with output projections of zero, and so they see, and attend to,
            just what it does.

    Returns:
        The deeper model.
    """
    config = copy.deepcopy(llava.config)
    config.text_config.num_hidden_layers = len(order)
    config.text_config.layer_types = None  # an entry for every layer, written when the old one was made
    deeper = build_llava(llava.model.vision_tower, config)
    state = llava.state_dict()
    old_layers = llava.model.language_model.layers
    deeper.load_state_dict(
        {name: value for name, value in state.items() if ".layers." not in name or "vision" in name}, strict=False
    )
    for i, (layer, source) in enumerate(zip(deeper.model.language_model.layers, order)):
        layer.load_state_dict(old_layers[source].state_dict())
        if source in order[i + 1 :]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return deeper


def loudness(llava: LlavaForConditionalGeneration) -> list[tuple[float, float]]:
    """Frobenius norms of the output projections of attention and MLP, layer by layer; a silent copy has zeros."""
    layers = llava.model.language_model.layers
    return [(layer.self_attn.o_proj.weight.norm().item(), layer.mlp.down_proj.weight.norm().item()) for layer in layers]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def answer_logits(llava: LlavaForConditionalGeneration, batch: Pack) -> Tensor:
    """Logits `[M, vocabulary]` at the M places of the batch that have a target, in order."""
    device = next(llava.model.language_model.parameters()).device
    embed = llava.get_input_embeddings()
    prefix = torch.tensor([prefix_ids()], device=device).expand(len(batch.text), -1)
    picture = llava.model.multi_modal_projector(batch.features.to(device))
    rows = torch.cat([embed(prefix), picture, embed(batch.text.to(device))], 1)
    hidden = llava.model.language_model(
        inputs_embeds=rows,
        attention_mask=batch.mask.to(device),
        position_ids=batch.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    answers = hidden[:, -batch.text.shape[1] :][batch.targets.to(device) != -100]
    return llava.lm_head(answers).float()


def look_away(weights: list[Tensor], batch: Looks, first: int = PREFIX) -> Tensor:
    """How far the heads are from looking at what decides the answers.

    The first half of the heads is asked for where a single thing is looked for, the second half where things are
    counted.

    Args:
        weights: Attention weights of some layers, each `[B, H, S, S]`.
        batch: What they attend in.
        first: Where the picture's tokens begin.

    Returns:
        The cross-entropy, in nats, between the attention that answering rows should pay to the deciding tokens and what
        they pay; the mean over rows, heads and layers.
    """
    length, kept = batch.look.shape[1:]
    device = weights[0].device
    total = torch.zeros((), device=device)
    for counting in (False, True):
        rows = (batch.share >= 0) & (batch.counting == counting)
        look, share = batch.look[rows].to(device)[:, None], batch.share[rows].to(device)[:, None]
        rows = rows.to(device)
        for layer in weights:
            heads = layer[:, :, -length:, first : first + kept].chunk(2, 1)[int(counting)]
            seen = heads.transpose(1, 2)[rows].float()  # [M, H / 2, K]
            paid = (seen * look).sum(-1).clamp(1e-4, 1 - 1e-4)
            total = total + F.binary_cross_entropy(paid, share.expand_as(paid), reduction="sum") / heads.shape[1]
    return total / len(weights) / (batch.share >= 0).sum()


def accuracy(
    llava: LlavaForConditionalGeneration, album: Album, keep: int = TOKENS, batch: int = 64
) -> dict[str, float]:
    """Share of questions whose whole answer is right, by type and over all, with `keep` random tokens a picture."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for first in range(0, len(album.scenes), batch):
        rows = slice(first, first + batch)
        rng = np.random.default_rng(first)
        shown = np.sort(rng.random((len(album.scenes[rows]), TOKENS)).argsort(1)[:, :keep], 1)
        questions = [ask_all(scene, random.Random(scene.digest)) for scene in album.scenes[rows]]
        chosen = np.arange(len(album.scenes))[rows]
        packed = pack(album, chosen, questions, random.Random(0), shown, renumber=True)
        with torch.no_grad(), mixed_precision(next(llava.parameters()).device):
            best = answer_logits(llava, packed).argmax(-1).cpu()
        answers = packed.targets != -100
        wrong = set(packed.owner[answers][best != packed.targets[answers]].tolist())
        for i, question in enumerate(packed.questions):
            for name in (question.type, "all"):
                asked[name] += 1
                right[name] += i not in wrong
    return {name: right[name] / asked[name] for name in sorted(asked)}


def begin(
    llava: LlavaForConditionalGeneration, work: Path, stage: Stage, device: torch.device
) -> tuple[Optimizer, Progress]:
    """Puts a model where it is trained, with the optimiser of a stage and its state as far as it has come."""
    llava.to(device).train()
    llava.set_attn_implementation("matmul")
    parts = {
        "projector": llava.model.multi_modal_projector,
        "decoder": llava.model.language_model,
        "head": llava.lm_head,
    }
    optimizer = Optimizer(
        parts.values(),
        stage.steps,
        muon_rate=stage.muon_rate,
        adam_rate=stage.adam_rate,
        decay=stage.decay,
        gentle=[llava.model.multi_modal_projector, llava.get_input_embeddings()],
    )
    return optimizer, Progress(work / f"{stage.name}.pt", parts, optimizer)


def train_stage(
    llava: LlavaForConditionalGeneration,
    album: Album,
    test: Album,
    work: Path,
    stage: Stage,
    seed: int,
    device: torch.device,
    log_every: int = 250,
) -> LlavaForConditionalGeneration:
    """Trains projector and decoder, or goes on with it.

    Args:
        llava: The model; its tower stays as it is.
        album: Training scenes.
        test: Held-out scenes for the curve in the log.
        work: Folder of the training's state.
        stage: What to do.
        seed: Seed of the batches.
        device: Where to train.
        log_every: Steps between two measurements, at which the state is saved as well.

    Returns:
        The model, on the CPU.
    """
    optimizer, progress = begin(llava, work, stage, device)
    layers = llava.model.language_model.layers
    average = 0.0
    while progress.step < stage.steps:
        packed = training_pack(album, (seed, stage.name), progress.step, stage.batch, stage.whole, stage.counts)
        with mixed_precision(device), watch_attention(layers[i].self_attn for i in stage.guided) as weights:
            logits = answer_logits(llava, packed)
        targets = packed.targets[packed.targets != -100].to(device)
        loss = F.cross_entropy(logits, targets)
        away = look_away(weights, packed) if weights else torch.zeros((), device=device)
        optimizer.step(loss + stage.guidance * away, progress.step)
        progress.step += 1
        average = loss.item() if not average else 0.98 * average + 0.02 * loss.item()
        if progress.step % log_every == 0 or progress.step == stage.steps:
            scores = accuracy(llava, test)
            report = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
            spent = "{wall:.0f} s ({cpu:.0f} s cpu)".format(**progress.spent)
            logger.info(
                "%s: step %d/%d, %s, loss %.3f, away %.3f, %s",
                stage.name,
                progress.step,
                stage.steps,
                spent,
                average,
                away.item(),
                report,
            )
            progress.save()
    return llava.cpu().eval()
