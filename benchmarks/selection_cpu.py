"""What a choice of visual tokens costs on a CPU: every selection of the library that takes features, and a tight loop.

    python benchmarks/selection_cpu.py

64 of 576 and 288 of 2,880 tokens of width 1,024, batch 1 and 8. The arms run in turn, round after round, in one
process, and a figure is the median of an arm; the loop is farthest-first (k-center) in five torch ops a round over one
matmul. Both leave the choice unsorted. The prefill is modelled: the multiplications of a LLaMA-7B (32 layers, width
4,096, MLP 11,008, no vocabulary) over the visual tokens and 64 of text, at the rate of a 4,096 x 4,096 fp32 matmul
that is measured in the same run. Writes ``benchmarks/results/selection_cpu.csv`` and ``.md``. No download.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import vlmtok
from vlmtok.mergers.visionzip import dominant_and_contextual
from vlmtok.pruners.cdpruner import dpp_map
from vlmtok.pruners.dart import largest, quotas, spread
from vlmtok.pruners.divprune import max_min_subset
from vlmtok.pruners.mmtok import multimodal_coverage
from vlmtok.pruners.scope import saliency_coverage
from vlmtok.pruners.todre import diverse_subset
from vlmtok.pruners.vispruner import important_and_diverse

WIDTH, WORDS, TEXT = 1024, 40, 64
LOOP = "k-center loop"
FIELDS = (
    "selection", "n", "k", "batch", "median_ms", "least_ms", "of_loop", "of_prefill", "of_saving", "rounds",
)  # fmt: skip


def tight_loop(x: Tensor, k: int) -> Tensor:
    """Farthest-first choice: the least that a greedy choice over cosines does in torch."""
    unit = x / x.norm(dim=-1, keepdim=True)
    table = unit @ unit.transpose(1, 2)
    lanes = torch.arange(len(x))
    pick = torch.zeros(len(x), dtype=torch.int64)
    state, order = table[:, 0].clone(), [pick]
    for _ in range(k - 1):
        pick = state.argmin(1)
        order.append(pick)
        state = torch.maximum(state, table[lanes, pick])
    return torch.stack(order, 1)


def dart(x: Tensor, k: int) -> Tensor:
    """DART with pivots of largest norm, none of a text."""
    first = largest(x.abs().sum(-1), 8)
    steering = x[torch.arange(len(x))[:, None], first]
    return torch.cat([first, spread(x, steering, quotas(k - 8, 8), first)], 1)


def arms(batch: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    """Every selection on one drawn input: forty clusters, attention as of a class token, words of a text."""
    centre = torch.randn(batch, 40, WIDTH)
    place = torch.randint(0, 40, (batch, n, 1)).expand(-1, -1, WIDTH)
    x = centre.gather(1, place) + 0.7 * torch.randn(batch, n, WIDTH)
    score = (2 * torch.randn(batch, n)).softmax(1)
    words, start = torch.randn(batch, WORDS, WIDTH), torch.zeros(batch, dtype=torch.int64)
    relevance = score / score.amax(1, keepdim=True)
    return {
        LOOP: lambda: tight_loop(x, k),
        "ToDRE": lambda: diverse_subset(x, k, start),
        "DivPrune": lambda: max_min_subset(x, k),
        "CDPruner": lambda: dpp_map(x, k, relevance),
        "SCOPE": lambda: saliency_coverage(x, k, score),
        "SCOPE, alpha 0": lambda: saliency_coverage(x, k, score, 0.0),
        "MMTok": lambda: multimodal_coverage(x, x, k, words),
        "VisPruner": lambda: important_and_diverse(score, x, k, k // 2),
        "VisionZip": lambda: dominant_and_contextual(score, x, k - k // 6, k // 6),
        "DART": lambda: dart(x, k),
    }


def prefill_flops(tokens: int) -> float:
    """Of one row through 32 layers of width 4,096, attention causal."""
    width, inner, layers = 4096, 11008, 32
    return layers * (2 * tokens * (4 * width * width + 3 * width * inner) + 2 * tokens * tokens * width)


def matmul_rate(rounds: int = 3) -> float:
    """fp32 FLOP/s of a matmul as wide as the model."""
    a, b = torch.randn(1024, 4096), torch.randn(4096, 4096)
    return max(2 * 1024 * 4096 * 4096 / seconds(lambda: a @ b) for _ in range(rounds))


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(n: int, k: int, batch: int, rounds: int, rate: float) -> list[dict[str, object]]:
    """Rows of the table for one size."""
    ways = arms(batch, n, k)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, call in ways.items():
            took = seconds(call)
            if number:  # the first round warms up
                spent[name].append(took)
    median = {name: statistics.median(values) for name, values in spent.items()}
    prefill = batch * prefill_flops(n + TEXT) / rate
    saving = prefill - batch * prefill_flops(k + TEXT) / rate
    return [
        {
            "selection": name, "n": n, "k": k, "batch": batch, "median_ms": f"{1e3 * median[name]:.4g}",
            "least_ms": f"{1e3 * min(spent[name]):.4g}", "of_loop": f"{median[name] / median[LOOP]:.2f}",
            "of_prefill": f"{median[name] / prefill:.2%}", "of_saving": f"{median[name] / saving:.2%}",
            "rounds": rounds,
        }
        for name in ways
    ]  # fmt: skip


def machine() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def page(rows: list[dict[str, object]], facts: dict[str, object]) -> str:
    """The table in markdown, a column a size."""
    sizes = list(dict.fromkeys((row["n"], row["k"], row["batch"]) for row in rows))
    text = ["# Selection on a CPU", "", (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(), ""]
    text += [f"- {name}: {value}" for name, value in facts.items()]
    head = " | ".join(f"{k} of {n}, batch {batch}" for n, k, batch in sizes)
    text += ["", "Milliseconds; times the loop; share of the prefill; share of what the cut saves of it.", ""]
    text += [f"| selection | {head} |", "|---" * (len(sizes) + 1) + "|"]
    for name in dict.fromkeys(row["selection"] for row in rows):
        cells = {(row["n"], row["k"], row["batch"]): row for row in rows if row["selection"] == name}
        shown = (
            f"{row['median_ms']}; {row['of_loop']} x; {row['of_prefill']}; {row['of_saving']}"
            for row in (cells[size] for size in sizes)
        )
        text.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of 576 tokens; of more tokens a third of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["576:64", "2880:288"], help="N:k")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selection_cpu.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    load, rate = os.getloadavg()[0], matmul_rate()
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for n, k in (map(int, size.split(":")) for size in given.sizes):
            for batch in given.batches:
                rows += measure(n, k, batch, given.rounds if n < 1000 else max(1, given.rounds // 3), rate)
    facts = {
        "processor": f"{machine()}, {given.threads} threads of {os.cpu_count()}",
        "versions": f"vlmtok {vlmtok.__version__}, torch {torch.__version__}",
        "load before the run": f"{load:.1f}" + (" (not quiet)" if load > 0.5 else ""),
        "rate of the modelled prefill": f"{rate / 1e9:.0f} GFLOP/s in fp32, measured in the run",
    }
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, *facts), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    text = page(rows, facts)
    given.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
