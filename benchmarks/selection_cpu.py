"""What a choice of visual tokens costs on a CPU: every method that makes it in one step, and tight loops in torch.

    python benchmarks/selection_cpu.py

64 of 576 and 288 of 2,880 tokens of width 1,024, batch 1 and 8. A method decides on a view of drawn tokens, its
signals drawn too: what it decides on is there, what it makes of it is timed. Two loops stand beside it: k-center, and
the method's own rule (`selection_loops.py`) where that is a greedy one. The arms run in turn, round after round, in one
process, and a figure is the median of an arm. The prefill is modelled: the multiplications of a LLaMA-7B (32 layers,
width 4,096, MLP 11,008, no vocabulary) over the visual tokens and 64 of text, at the rate of a 4,096 x 4,096 fp32
matmul that is measured in the same run. Writes ``benchmarks/results/selection_cpu.csv`` and ``.md``. No download.
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
from typing import Any

import selection_loops as loops
import torch
from torch import Tensor

import vlmtok
from vlmtok.core.method import Method
from vlmtok.core.reduction import Reduction
from vlmtok.core.site import Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.lab.catalogue import KINDS, kinds_of

WIDTH, HEADS, WORDS, TEXT, FRAMES = 1024, 16, 40, 64, 16
LOOP = "k-center loop"
METHODS = (
    "cdpruner:keep={k}", "corematching:keep={k}", "dart:keep={k}", "divprune:keep={k}", "evs:rate={rate}",
    "fastervlm:keep={k}", "fastv:keep={k}", "grid:keep={k}", "hiprune:keep={k}", "holov:keep={k}", "mmtok:keep={k}",
    "prumerge:keep={k}", "random:keep={k}", "scope:keep={k}", "todre:keep={k}", "tokencorr:keep={k}",
    "vidcom2:rate={rate}", "visionzip:keep={k}", "vispruner:keep={k}",
)  # fmt: skip
"""Methods that choose in one step. Others reach a budget over layers, by the same sorts as FastV or by matching."""
FIELDS = (
    "method", "spec", "n", "k", "batch", "median_ms", "least_ms", "of_loop", "of_own_loop", "of_prefill", "of_saving",
    "rounds",
)  # fmt: skip
Arm = Callable[[], object]


class Drawn:
    """One batch of tokens and all that methods decide on, drawn: forty clusters, attention that few tokens get."""

    def __init__(self, batch: int, n: int) -> None:
        centre = torch.randn(batch, 40, WIDTH)
        place = torch.randint(0, 40, (batch, n, 1)).expand(-1, -1, WIDTH)
        self.batch, self.n = batch, n
        self.x = centre.gather(1, place) + 0.7 * torch.randn(batch, n, WIDTH)
        self.score = (2 * torch.randn(batch, n)).softmax(1)
        self.words = torch.randn(batch, WORDS, WIDTH)
        side = {576: 24, 2880: 48}.get(n, 1)
        self.grid = side, n // side

    def signal(self, name: str) -> Tensor:
        """Of the shape that `vlmtok.core.signals` names."""
        b, n, kind = self.batch, self.n, name.partition("@")[0]
        made: dict[str, Callable[[], Tensor]] = {
            "cls_attention": lambda: self.score.unsqueeze(1).expand(b, HEADS, n) / HEADS,
            "last_attention": lambda: self.score.unsqueeze(1).expand(b, HEADS, n) / HEADS,
            "received_attention": lambda: self.score,
            "activation_match": lambda: torch.rand(b, n, WORDS + 1),
            "keys": lambda: torch.randn(b, n, WIDTH // HEADS),
            "keys_full": lambda: torch.randn(b, n, WIDTH),
            "protected": lambda: torch.randn(b, 1, WIDTH),
            "protected_queries": lambda: torch.randn(b, 1, WIDTH),
            "protected_keys": lambda: torch.randn(b, 1, WIDTH),
            "outputs": lambda: self.x,
            "normed": lambda: self.x,
            "text": lambda: self.words,
            "text_normed": lambda: self.words,
            "key_norm": lambda: self.x.abs().sum(-1),
            "text_key_norm": lambda: self.words.abs().sum(-1),
        }
        return made[kind]()


def choice(method: Method, drawn: Drawn) -> tuple[Callable[[], Reduction | None], int]:
    """A method's decision on a drawn view, and how many tokens it leaves."""
    site = method.sites(KINDS[kinds_of(method.spec_name())[0]].layout())[0]
    scope = site.scope or method.scope
    site = Site(site.stage, site.layer, needs=site.needs, scope=scope)
    signals = {name: drawn.signal(name) for name in site.needs}
    frames = FRAMES if scope == "clip" else 0

    def decide() -> Reduction | None:
        # A view remembers what was made of it, so each decision gets its own.
        return method.reduce(TokenView(drawn.x, site, grid=drawn.grid, frames=frames, depth=32, signals=signals))

    reduction = decide()
    return decide, drawn.n if reduction is None or reduction.keep is None else reduction.keep.shape[1]


def own_loops(drawn: Drawn, k: int) -> dict[str, Arm]:
    """The rules of the greedy methods as tight loops, by their names in the registry."""
    x, score = drawn.x, drawn.score
    return {
        "cdpruner": lambda: loops.determinantal(x, k, score / score.amax(1, keepdim=True)),
        "divprune": lambda: loops.isolated_first(x, k),
        "mmtok": lambda: loops.covering(loops.looks(x, x, drawn.words), k),
        "scope": lambda: loops.covering(loops.cosines(x), k, score),
        "todre": lambda: loops.dispersed(x, k, score.argmax(1)),
        "vispruner": lambda: loops.without_near(x, k, score),
    }


def prefill_flops(tokens: int) -> float:
    """Of one row through 32 layers of width 4,096, attention causal."""
    width, inner, layers = 4096, 11008, 32
    return layers * (2 * tokens * (4 * width * width + 3 * width * inner) + 2 * tokens * tokens * width)


def matmul_rate(rounds: int = 3) -> float:
    """fp32 FLOP/s of a matmul as wide as the model."""
    a, b = torch.randn(1024, 4096), torch.randn(4096, 4096)
    return max(2 * 1024 * 4096 * 4096 / seconds(lambda: a @ b) for _ in range(rounds))


def seconds(call: Arm) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(ways: dict[str, Arm], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median and least seconds of each way, which run in turn; a round before warms up."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, call in ways.items():
            spent[name].append(seconds(call))
    medians = {name: statistics.median(values[1:]) for name, values in spent.items()}
    return medians, {name: min(values[1:]) for name, values in spent.items()}


def measure(n: int, k: int, batch: int, rounds: int, rate: float) -> list[dict[str, Any]]:
    """Rows of the table for one size."""
    drawn = Drawn(batch, n)
    own = own_loops(drawn, k)
    ways: dict[str, Arm] = {LOOP: lambda: loops.k_center(drawn.x, k)}
    specs = {}
    for template in METHODS:
        (method,) = parse_methods(template.format(k=k, rate=1 - k / n))
        name = method.spec_name()
        ways[name], left = choice(method, drawn)
        specs[name] = str(method)
        if abs(left - k) > 1:  # PruMerge adds the mean of all others, EVS rounds a rate
            raise SystemExit(f"{method} leaves {left} of {n} tokens, not {k}")
    # Own loops come last: what they leave of the memory slows whatever comes next.
    median, least = timed(ways, rounds)
    beside, _ = timed(own, 1 if n > 1000 else rounds)
    prefill = batch * prefill_flops(n + TEXT) / rate
    saving = prefill - batch * prefill_flops(k + TEXT) / rate
    return [
        {
            "method": name, "spec": specs.get(name, ""), "n": n, "k": k, "batch": batch,
            "median_ms": f"{1e3 * median[name]:.4g}", "least_ms": f"{1e3 * least[name]:.4g}",
            "of_loop": f"{median[name] / median[LOOP]:.2f}",
            "of_own_loop": f"{median[name] / beside[name]:.2f}" if name in own else "",
            "of_prefill": f"{median[name] / prefill:.4g}", "of_saving": f"{median[name] / saving:.4g}",
            "rounds": rounds,
        }
        for name in ways
    ]  # fmt: skip


def machine() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def page(rows: list[dict[str, Any]], facts: dict[str, object]) -> str:
    """The table in markdown, a column a size."""
    sizes = list(dict.fromkeys((row["n"], row["k"], row["batch"]) for row in rows))
    what = (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip()
    text = ["# Selection on a CPU", "", what.partition(" Writes")[0], ""]
    text += [f"- {name}: {value}" for name, value in facts.items()]
    head = " | ".join(f"{k} of {n}, batch {batch}" for n, k, batch in sizes)
    text += [
        "",
        "Times the k-center loop; times the method's own loop; share of what the cut saves of the prefill.",
        "",
    ]
    text += [f"| method | {head} |", "|---" * (len(sizes) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != LOOP):
        cells = {(row["n"], row["k"], row["batch"]): row for row in rows if row["method"] == name}
        shown = (
            f"{row['of_loop']}; {row['of_own_loop'] or '-'}; {float(row['of_saving']):.2%}"
            for row in (cells[size] for size in sizes)
        )
        text.append(f"| `{name}` | " + " | ".join(shown) + " |")
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
    rows: list[dict[str, Any]] = []
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
