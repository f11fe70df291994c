"""The projector's first training, before any question: each visual token is made to say what it shows, in words.

LLaVA aligns its projector on captions while the language model rests. Here the captions are known patch by patch: a
projected token must equal the sum of the embeddings of the words that hold there. The language model then starts from
pictures that it can read, and what is left to learn is where to look.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tiny_llava.packing import Album
from tiny_llava.processor import IMAGE, vocabulary
from tiny_llava.scenes import CELL, COLUMNS, KINDS, PLURALS, ROWS, Scene
from tiny_llava.tower import GRID, PATCH, TOKENS, find_centres, inside
from tiny_llava.training import Optimizer, Progress, logger


@lru_cache(maxsize=1)
def _index() -> dict[str, int]:
    return {word: i for i, word in enumerate(vocabulary())}


@lru_cache(maxsize=1)
def _places() -> np.ndarray:
    """The two place words of every patch, `[144, V]`."""
    words = np.zeros((TOKENS, len(_index())), np.float32)
    for i in range(TOKENS):
        row, column = (int((at + 0.5) * PATCH // CELL) for at in divmod(i, GRID))
        words[i, [_index()[ROWS[row]], _index()[COLUMNS[column]]]] = 1
    return words


def words_of(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The words that each patch stands for.

    On a thing a patch says colour, kind, whether it is a shape or a digit, and its place ("top", "left"); the patch
    nearest to the thing's centre says "thing", once for each thing, so that things can be counted. On the background a
    patch says nothing. Were it to say its place too, places would drown in background. All patches say "<image>", which
    tells them from the words of the question.

    Returns:
        How often each word is said `[144, V]`, and which patches have a fair answer `[144]`: those on a thing or clear
        of all of them, not those on a rim.
    """
    index = _index()
    owner, touched = inside(scene), inside(scene, margin=PATCH * 0.75)
    words = np.where(owner[:, None] < 0, 0, _places())
    words[:, index[IMAGE]] = 1
    for i, t in enumerate(scene.things):
        for word in (t.color, t.kind, "digit" if t.is_digit else "shape"):
            words[owner == i, index[word]] = 1
    words[find_centres(scene), index["thing"]] = 1
    return words, (owner >= 0) | (touched < 0)


def initialise_words(llava: LlavaForConditionalGeneration, index: dict[str, int] | None = None) -> None:
    """Gives the words orthonormal embeddings, plurals that lie near their singulars, and the head the same rows.

    Args:
        llava: The model.
        index: From words to ids; by default those of tiny-llava.
    """
    table = llava.get_input_embeddings().weight
    index = _index() if index is None else index
    with torch.no_grad():
        nn.init.orthogonal_(table)
        for shape, plural in PLURALS.items():
            table[index[plural]] = (table[index[plural]] + table[index[shape]]) / 2**0.5
        for plural, singular in (("things", "thing"), ("shapes", "shape")):
            if plural in index:
                table[index[plural]] = (table[index[plural]] + table[index[singular]]) / 2**0.5
        llava.lm_head.weight.copy_(table)


def whiten(first: nn.Linear, features: Tensor) -> None:
    """Starts the projector's first layer where the features `[N, C]` come out uncorrelated and of unit variance."""
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((features - mean).T))
    whitening = (vectors * (values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
    with torch.no_grad():
        first.weight.copy_(whitening)
        first.bias.copy_(-whitening @ mean)


def align(
    llava: LlavaForConditionalGeneration,
    album: Album,
    test: Album,
    path: Path,
    seed: int,
    steps: int,
    rate: float = 3e-3,
    batch: int = 64,
) -> None:
    """Trains the projector alone on the words of each patch, or goes on with it.

    Args:
        llava: The model; only its projector changes.
        album: Training scenes.
        test: Held-out scenes for the log.
        path: File of the stage's state.
        seed: Seed of the batches.
        steps: Length of the stage.
        rate: Highest learning rate.
        batch: Pictures a step.
    """
    projector = llava.model.multi_modal_projector
    table = llava.get_input_embeddings().weight.detach()
    whiten(projector.linear_1, torch.from_numpy(album.features[:256].astype(np.float32)).flatten(0, 1))
    optimizer = Optimizer([projector], steps, adam_rate=rate, decay=0.7)
    progress = Progress(path, {"projector": projector}, optimizer)
    while progress.step < steps:
        rng = np.random.default_rng((seed, progress.step))
        rows = np.sort(rng.choice(len(album.scenes), batch, replace=False))
        loss, _ = _misfit(projector, table, album, rows)
        optimizer.step(loss, progress.step)
        progress.step += 1
        if progress.step % 500 == 0 or progress.step == steps:
            with torch.no_grad():
                _, scores = _misfit(projector, table, test, np.arange(len(test.scenes)))
            report = " ".join(f"{name} {value:.4f}" for name, value in scores.items())
            logger.info("alignment: step %d/%d, loss %.4f, %s", progress.step, steps, loss.item(), report)
            progress.save()
    logger.info("alignment: %(wall).0f s on the clock, %(cpu).0f s of processor time", progress.spent)


def _misfit(projector: nn.Module, table: Tensor, album: Album, rows: np.ndarray) -> tuple[Tensor, dict[str, float]]:
    """Squared distance from what the patches must say, and how often the words read off them are right."""
    said = [words_of(album.scenes[i]) for i in rows]
    words, fair = (torch.from_numpy(np.stack(part)) for part in zip(*said))
    projected = projector(torch.from_numpy(album.features[rows].astype(np.float32)))[fair]
    words = words[fair]
    loss = (projected - words @ table).square().sum(-1).mean()
    index = _index()
    scores = {}
    with torch.no_grad():
        read = projected @ table.T
        kinds = [index[kind] for kind in KINDS]
        on_thing = words[:, kinds].sum(1) > 0
        scores["kind"] = _agreement(read[on_thing][:, kinds], words[on_thing][:, kinds])
        for name, names in (("row", ROWS), ("column", COLUMNS)):
            columns = [index[word] for word in names]
            scores[name] = _agreement(read[on_thing][:, columns], words[on_thing][:, columns])
        scores["thing"] = (
            ((read[:, index["thing"]] > 0.5) == (words[:, index["thing"]] > 0.5))[on_thing].float().mean().item()
        )
    return loss, scores


def _agreement(read: Tensor, words: Tensor) -> float:
    return (read.argmax(1) == words.argmax(1)).float().mean().item()
