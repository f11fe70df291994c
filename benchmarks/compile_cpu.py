"""torch.compile on a CPU, over a bare and over a compressed ViT: compress first, then compile.

    python benchmarks/compile_cpu.py

All arms run in turn, round after round, in one process; a figure is the ratio of medians. Compiling itself is not
counted, and said apart. The result goes to ``benchmarks/results/compile_cpu.json``. Needs timm and a C++ compiler, no
download.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import vlmtok


def arms(model: torch.nn.Module, method: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The four ways to run it, each with a model of its own."""
    made: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"bare": model}
    made["bare, compiled"] = torch.compile(copy.deepcopy(model), fullgraph=True)
    for name, wrap in (
        ("compressed", lambda m: m),
        ("compressed, compiled", lambda m: torch.compile(m, fullgraph=True)),
    ):
        twin = copy.deepcopy(model)
        vlmtok.compress(twin, method)
        made[name] = wrap(twin)
    return made


def main() -> None:
    """Measures, prints the ratios, writes them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--method", default="tome:r=16")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pictures = torch.randn(options.batch, 3, 224, 224)
    ways = arms(timm.create_model(options.model, pretrained=False).eval(), options.method)
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for number in range(options.rounds + 2):
            for name, run in ways.items():
                start = time.perf_counter()
                run(pictures)
                spent = time.perf_counter() - start
                if number == 0:
                    first[name] = spent
                elif number > 1:
                    seconds[name].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {name: round(median["bare"] / value, 3) for name, value in median.items()}
    gain = round(median["compressed"] / median["compressed, compiled"], 3)
    for name, value in ratio.items():
        print(f"{name:22} {value:5.2f} x")
    print(f"compiling the compressed model gains {gain:.2f} x")
    result = {
        "model": options.model,
        "method": options.method,
        "batch": options.batch,
        "threads": options.threads,
        "dtype": "float32",
        "rounds": options.rounds,
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vlmtok": vlmtok.__version__,
        "speed_up": {name: value for name, value in ratio.items() if name != "bare"},
        "gain_of_compiling_the_compressed": gain,
        "compiling_in_forwards_of_bare": {
            name: round(value / median["bare"]) for name, value in first.items() if "compiled" in name
        },
        "spread": {name: [round(v / median["bare"], 3) for v in sorted(values)] for name, values in seconds.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
