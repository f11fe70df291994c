"""Accuracy of every method at equal numbers of visual tokens, on the checkpoint that ships with the package.

    python benchmarks/tiny_llava.py --threads 2

asks the 2,000 held-out questions of the model card once for each method and budget, greedily, through
`vlmtok.compress`, and writes `benchmarks/results/tiny_llava.json` and `.md` after each. A run that was stopped goes on
where it was; results of another checkpoint are thrown away.

A budget is the mean number of visual tokens over the language model's layers, so methods that cut before it and methods
that cut inside it do the same work there. The latter cannot go below what their first layers cost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from tiny_llava.evaluate import Checkpoint, score
from tiny_llava.scenes import QUESTION_TYPES, exam

import vlmtok
from vlmtok.errors import VlmtokError
from vlmtok.forecast.budget import budget, measure
from vlmtok.forecast.estimate import estimate

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "vlmtok" / "data" / "tiny-llava"
RESULTS = ROOT / "benchmarks" / "results" / "tiny_llava.json"
QUESTIONS = 2000
BATCH = 50
BUDGETS = (72, 36, 16)
TEXT_TOKENS = 11

# Where `vlmtok.budget` has no number to move, or none that fits to a percent: settings within 7 percent of the budget.
SETTINGS: dict[str, dict[int, str]] = {
    "random at layer 2": {36: "random:keep=21:stage=decoder:layer=2"},
    "aim": {36: "aim:first=15:last=15", 16: "aim:first=5:last=9"},
    "averagepool": {72: "averagepool:output_size=(6;12)"},
    "crossget": {72: "crossget:rv=14", 36: "crossget:rv=22"},
    "fastv": {36: "fastv:keep=21"},
    "prumerge": {72: "prumerge:keep=71", 36: "prumerge:keep=35", 16: "prumerge:keep=15"},
    "tca": {16: "tca:ratio=0.44"},
}
# Other settings of some methods: the baseline where FastV cuts; CDPruner without its sign for CLIP, whose patches and
# texts correlate inversely; SparseVLM with its first cut where this model begins to look at the picture.
VARIANTS = {
    "random at layer 2": "random:stage=decoder:layer=2",
    "cdpruner without its sign": "cdpruner:negate=false",
    "sparsevlm from layer 2": "sparsevlm:layers=(2;3;7)",
}

_PAGE = """\
# Methods on tiny-llava

Shares of {questions:,} held-out questions right to the letter, by type and over all. The budget is the mean number of
visual tokens over the 16 layers of the language model (bare: 144); methods that cut inside it cannot go below what
their first layers cost. Random draws anew for every 50 questions. Written by `benchmarks/tiny_llava.py`.

{table}
"""


def specs(model: torch.nn.Module) -> list[tuple[str, int, str | None, str]]:
    """Every method at every budget: its name, the budget, its spec, and why there is none."""
    found: list[tuple[str, int, str | None, str]] = [("random", 14, "random:keep=0.1", "")]
    for name in sorted({*vlmtok.list_methods(), *VARIANTS}, key=lambda name: (not name.startswith("random"), name)):
        for tokens in BUDGETS:
            spec, why = SETTINGS.get(name, {}).get(tokens), ""
            if spec is None:
                try:
                    start = VARIANTS.get(name, name)
                    spec = str(budget(start, model, layer_average_tokens=tokens, text_tokens=TEXT_TOKENS))
                except VlmtokError as problem:
                    why = str(problem)
            found.append((name, tokens, spec, why))
    return found


def ask(checkpoint: Checkpoint, spec: str | None, number: int) -> dict[str, Any]:
    """Asks the exam under a method; None for the bare model."""
    questions = exam(number, "exam")
    began = time.perf_counter()
    row: dict[str, Any] = {"spec": spec, "questions": number}
    if spec is None:
        row["right"] = score(questions, checkpoint.answer, BATCH)
        row["layer_average_tokens"] = float(checkpoint.model.config.image_seq_length)
    else:
        report = estimate(checkpoint.model, spec, text_tokens=TEXT_TOKENS)
        row["layer_average_tokens"] = measure(report, "layer_average_tokens")[1]
        row["last_tokens"] = measure(report, "tokens")[1]
        seeds = count()

        def answer(pictures: list[Image.Image], texts: list[str]) -> list[str]:
            # `Random` keeps the same places of every picture, so one draw says little: each batch gets its own.
            drawn = f"{spec}:seed={next(seeds)}" if spec.startswith("random") else spec
            with vlmtok.compress(checkpoint.model, drawn):
                return checkpoint.answer(pictures, texts)

        row["right"] = score(questions, answer, BATCH)
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def table(results: dict[str, Any]) -> str:
    """The results as markdown."""
    rows = results["rows"]
    head = ["method", "budget", "setting", "tokens a layer", *QUESTION_TYPES, "all", "against random"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        if "right" not in row:
            lines.append(f"| {row['method']} | {row['budget']} | cannot |" + " |" * (len(head) - 3))
            continue
        right = row["right"]
        shares = [f"{right[name]:.1%}" for name in (*QUESTION_TYPES, "all")]
        random = next(
            (r["right"]["all"] for r in rows if r["method"] == "random" and r["budget"] == row["budget"]), None
        )
        error = 100 * math.sqrt(right["all"] * (1 - right["all"]) / row["questions"])
        gap = "" if random is None else f"{100 * (right['all'] - random):+.1f} (s.e. {error:.1f})"
        setting = f"`{row['spec']}`" if row["spec"] else ""
        tokens = f"{row['layer_average_tokens']:.1f}"
        lines.append("| " + " | ".join([row["method"], str(row["budget"]), setting, tokens, *shares, gap]) + " |")
    return _PAGE.format(questions=rows[0]["questions"], table="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", help="methods, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    results: dict[str, Any] = {"checkpoint": digest, "rows": []}
    if args.results.exists():
        stored = json.loads(args.results.read_text("utf-8"))
        if stored["checkpoint"] == digest:
            results = stored
    done = Counter((row["method"], row["budget"], row["questions"], row["spec"]) for row in results["rows"])
    checkpoint = Checkpoint(FOLDER)
    bare = ("bare", checkpoint.model.config.image_seq_length, None, "")
    for name, tokens, spec, why in [bare, *specs(checkpoint.model)]:
        if done[name, tokens, args.questions, spec] or (args.only and name not in args.only.split(",")):
            continue
        row = {"method": name, "budget": tokens}
        if why:
            row |= {"spec": None, "questions": args.questions, "why": why}
        else:
            row |= ask(checkpoint, spec, args.questions)
            print(f"{name} {tokens}: {row['right']['all']:.3f} ({row['seconds']:.0f} s)", flush=True)
        results["rows"].append(row)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        args.results.with_suffix(".md").write_text(table(results), "utf-8")


if __name__ == "__main__":
    main()
