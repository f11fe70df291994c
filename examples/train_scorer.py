"""Trains the scorer of method `learned` on the checkpoint that ships: `python examples/train_scorer.py`.

Draws questions about training scenes, keeps those that the model answers right, asks gradients through all of its
layers what each visual token did for the answer, trains a small convolution net to say so from the first layer's
attention alone, and asks held-out questions with what it keeps. Every stage lies in ``--work``; a run that was stopped
goes on where it was. The labels follow what is known of arXiv 2506.01097; see the docstring of `vlmtok.Learned`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_llava.evaluate import Checkpoint, Exam, score
from tiny_llava.scenes import QUESTION_TYPES, ask, exam, render, sample_scene

import vlmtok
from vlmtok.core.selection import keep_top
from vlmtok.pruners.learned import ConvScorer

logger = logging.getLogger("train_scorer")
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "vlmtok" / "data" / "tiny-llava"
RESULTS = ROOT / "benchmarks" / "results" / "learned_scorer.csv"
TOKENS = 144
BUDGETS = (72, 36, 16)
BATCH, RATE, SHARE_HELD = 128, 1e-3, 0.1


# ---------------------------------------------------------------------- labels
def rollout(attentions: Sequence[Tensor], gradients: Sequence[Tensor], row: int) -> Tensor:
    """What each token did for a row of the last layer: attention weighted by its gradient, rolled out over layers.

    ``R = I; R <- R + mean_h (A * dA)^+ R`` from the first layer to the last; one row of R needs vectors alone.

    Args:
        attentions: of each layer, `[B, H, L, L]`.
        gradients: of the log-probability of what the row predicts, the same.
        row: whose.

    Returns:
        `[B, L]`.
    """
    found = F.one_hot(torch.tensor(row), attentions[0].shape[-1]).to(attentions[0]).expand(len(attentions[0]), 1, -1)
    for attention, gradient in zip(reversed(attentions), reversed(gradients)):
        found = found + found @ (attention * gradient).relu().mean(1)
    return found[:, 0]


def target(relevance: Tensor) -> Tensor:
    """The upper half of each row as a distribution; of equal entries the first ones stay.

    Args:
        relevance: `[B, N]`, not negative.

    Returns:
        `[B, N]`, N / 2 entries rounded up, with sum 1; where all is zero, equal ones.
    """
    kept = keep_top(relevance, -(-relevance.shape[1] // 2))
    upper = relevance.gather(1, kept)
    upper = torch.where(upper.sum(1, keepdim=True) > 0, upper, 1.0)
    return torch.zeros_like(relevance).scatter(1, kept, upper / upper.sum(1, keepdim=True))


def alike(model: Checkpoint, part: Exam, size: int) -> Iterator[list[int]]:
    """Places of questions whose prompts are equally long, so that none is padded."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, (_, question) in enumerate(part):
        groups[len(model.processor.tokenizer(question.text).input_ids)].append(place)
    for places in groups.values():
        yield from (places[first : first + size] for first in range(0, len(places), size))


def labelled(model: Checkpoint, part: Exam, size: int = 25) -> dict[str, Tensor]:
    """Attention of the instruction in layer 0, and what gradients say, of every question of a part.

    Args:
        model: with eager attention.
        part: scenes and questions.
        size: questions at a time.

    Returns:
        ``attention`` and ``relevance``, `[Q, 144]`, and ``right``, bool `[Q]`, in the order of the part.
    """
    found = {"attention": torch.zeros(len(part), TOKENS), "relevance": torch.zeros(len(part), TOKENS)}
    found["right"] = torch.zeros(len(part), dtype=torch.bool)
    for places in alike(model, part, size):
        asked = [part[place] for place in places]
        inputs = model.inputs([render(scene) for scene, _ in asked], [question.text for _, question in asked])
        assert bool(inputs["attention_mask"].all()), "a padded row"
        with torch.no_grad():
            out = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        start = inputs["input_ids"].shape[1]
        words = model.processor.batch_decode(out[:, start:], skip_special_tokens=True)
        # Answers that are shorter than others go on with the end-of-text token, which counts in no mean.
        said = out[:, start:] != model.model.generation_config.eos_token_id
        said &= out[:, start:] != model.model.config.text_config.pad_token_id
        attention, relevance = _explained(model.model, inputs, out, start, said)
        found["attention"][places], found["relevance"][places] = attention, relevance
        found["right"][places] = torch.tensor([w.strip() == q.answer for w, (_, q) in zip(words, asked)])
    return found


def _explained(model: Any, inputs: Any, out: Tensor, start: int, said: Tensor) -> tuple[Tensor, Tensor]:
    """Layer 0's attention of the instruction, and the mean rollout of the tokens that were said, `[B, 144]` each."""
    made = model(
        input_ids=out,
        attention_mask=torch.ones_like(out),
        pixel_values=inputs["pixel_values"],
        output_attentions=True,
        use_cache=False,
    )
    first = int((out[0] == model.config.image_token_id).nonzero()[0])
    visual = slice(first, first + TOKENS)
    total = torch.zeros(len(out), TOKENS)
    for step in range(int(said.sum(1).max())):
        row = start + step - 1
        logs = made.logits[:, row].log_softmax(-1).gather(1, out[:, row + 1, None])[:, 0]
        gradients = torch.autograd.grad((logs * said[:, step]).sum(), made.attentions, retain_graph=True)
        total += rollout([a.detach() for a in made.attentions], gradients, row)[:, visual]
    text = made.attentions[0].detach()[:, :, visual.stop : start, visual].mean((1, 2))
    return text, total / said.sum(1, keepdim=True).clamp(min=1)


def draw(number: int, seed: int) -> Exam:
    """Questions about training scenes, the types in turn."""
    drawn: Exam = []
    attempt = 0
    while len(drawn) < number:
        scene = sample_scene("train", "scorer", seed, attempt)
        kind = QUESTION_TYPES[len(drawn) % len(QUESTION_TYPES)]
        question = ask(scene, kind, random.Random(f"scorer:{seed}:{attempt}"))
        attempt += 1
        if question is not None:
            drawn.append((scene, question))
    return drawn


def kept_on_disk(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a file holds, or what is made and written now, in one move."""
    if not path.exists():
        made = make()
        draft = path.with_suffix(".draft")
        torch.save(made, draft)
        draft.replace(path)
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def label(model: Checkpoint, part: Exam, work: Path, name: str, chunk: int = 150) -> dict[str, Tensor]:
    """`labelled`, in pieces on disk."""
    pieces = []
    for first in range(0, len(part), chunk):
        path = work / f"{name}_{first:05d}_{chunk}.pt"
        pieces.append(kept_on_disk(path, lambda first=first: labelled(model, part[first : first + chunk])))
        logger.info("%s: %d of %d labelled", name, min(first + chunk, len(part)), len(part))
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


# ---------------------------------------------------------------------- training
def train(data: dict[str, Tensor], path: Path, epochs: int, seed: int) -> ConvScorer:
    """A scorer by KL divergence from the targets to its softmax; the state is kept after every tenth epoch.

    Args:
        data: of `labelled`; questions that were answered wrong are left out.
        path: of the state.
        epochs: in all.
        seed: of weights and order.
    """
    inputs, targets = data["attention"][data["right"]][:, None], target(data["relevance"][data["right"]])
    held = int(SHARE_HELD * len(inputs))
    torch.manual_seed(seed)
    net = ConvScorer()
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        done = state["epoch"]
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def loss(rows: Tensor) -> Tensor:
        return F.kl_div(net(inputs[rows]).log_softmax(-1), targets[rows], reduction="batchmean")

    for epoch in range(done + 1, epochs + 1):
        order = held + torch.randperm(len(inputs) - held, generator=torch.Generator().manual_seed(seed + epoch))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            spent = loss(rows)
            spent.backward()
            optimizer.step()
        schedule.step()
        if epoch % 10 == 0 or epoch == epochs:
            with torch.no_grad():
                logger.info("epoch %d: KL %.3f, held-out %.3f", epoch, spent.item(), loss(torch.arange(held)).item())
            draft = path.with_suffix(".draft")
            torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, draft)
            draft.replace(path)
    return net.eval()


# ---------------------------------------------------------------------- measuring
@dataclass(eq=False)
class Given(vlmtok.Method):
    """Keeps the tokens of highest user signal ``label``."""

    keep: int = 72

    def sites(self, layout: vlmtok.Layout) -> list[vlmtok.Site]:
        """The language model's input."""
        return [vlmtok.Site("projected", needs=("label",))]

    def reduce(self, view: vlmtok.TokenView) -> vlmtok.Reduction:
        """The best ones."""
        return vlmtok.Reduction(keep_top(view.signal("label"), self.keep))

    def count(self, counts: vlmtok.Counts) -> int:
        """As `keep` says."""
        return self.keep


def measure(model: Checkpoint, test: Exam, labels: Tensor, net: ConvScorer, results: Path, run: dict[str, int]) -> None:
    """Shares right with what each way keeps, a row of the CSV each; rows that are there are not measured again.

    Args:
        model: with any attention.
        test: held-out questions.
        labels: `[Q, 144]` of them, the upper bound.
        net: the trained scorer.
        results: the CSV.
        run: what the rows belong to, in columns of the CSV; rows of another run go.
    """
    ways: dict[str, Callable[[int], vlmtok.Method]] = {
        "random": lambda keep: vlmtok.Random(keep=keep),
        "divprune": lambda keep: vlmtok.DivPrune(keep=keep),
        "untrained": lambda keep: vlmtok.Learned(keep=keep),
        "trained": lambda keep: vlmtok.Learned(keep=keep, scorer=net),
        "labels": lambda keep: Given(keep),
    }
    columns = ["method", "tokens", *run, *QUESTION_TYPES, "all"]
    rows: list[dict[str, Any]] = []
    if results.exists():
        with results.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if all(row.get(name) == str(run[name]) for name in run)]
    there = {(row["method"], int(row["tokens"])) for row in rows}
    for name, way in ways.items():
        for tokens in BUDGETS:
            if (name, tokens) in there:
                continue
            now: list[Tensor] = []

            def answer(pictures: list[Image.Image], questions: list[str], now: list[Tensor] = now) -> list[str]:
                first = len(now)
                now.extend(labels[first : first + len(questions)])
                return model.answer(pictures, questions)

            signals = {"label": lambda view, now=now: torch.stack(now[-len(view.tokens) :])}
            given = {"signals": signals} if name == "labels" else {}
            with vlmtok.compress(model.model, way(tokens), **given):
                right = score(test, answer)
            figures = {kind: f"{right[kind]:.4f}" for kind in (*QUESTION_TYPES, "all")}
            rows.append({"method": name, "tokens": tokens, **run, **figures})
            logger.info("%s with %d of %d tokens: %.1f %%", name, tokens, TOKENS, 100 * right["all"])
            with results.open("w", newline="") as file:
                table = csv.DictWriter(file, columns, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/scorer"), help="state of the run (a few MB)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="gets the figures")
    parser.add_argument("--questions", type=int, default=3000, help="to train on")
    parser.add_argument("--exam", type=int, default=600, help="held-out questions")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    work = args.work / f"seed{args.seed}_{args.questions}_{args.epochs}"
    work.mkdir(parents=True, exist_ok=True)
    began = time.time()
    eager = Checkpoint(FOLDER, attention="eager")
    data = label(eager, draw(args.questions, args.seed), work, "train")
    logger.info("%.1f %% of the training questions are answered right", 100 * data["right"].float().mean())
    net = train(data, work / "training.pt", args.epochs, args.seed)
    from safetensors.torch import save_file

    save_file(net.state_dict(), work / "scorer.safetensors")
    test = exam(args.exam, "scorer", args.seed)
    labels = label(eager, test, work, "exam")["relevance"]
    run = {"trained_on": args.questions, "epochs": args.epochs, "questions": args.exam, "seed": args.seed}
    measure(Checkpoint(FOLDER), test, labels, net, args.results, run)
    logger.info("done in %.1f minutes; weights in %s", (time.time() - began) / 60, work / "scorer.safetensors")


if __name__ == "__main__":
    main()
