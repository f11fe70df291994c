"""torch.compile on a CPU, over a bare and over a compressed ViT: compress first, then compile.

    python benchmarks/compile_cpu.py

All arms run in turn, round after round, in one process; a figure is the ratio of medians. Compiling itself is not
counted, and said apart. The result goes to ``benchmarks/results/compile_cpu.json``. Needs timm and a C++ compiler, no
download.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import timm
import torch
import turns

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
    given = turns.options(
        __doc__, rounds=15, model="vit_small_patch16_224", result="compile_cpu.json", method="tome:r=16"
    )
    pictures = torch.randn(given.batch, 3, 224, 224)
    ways = arms(timm.create_model(given.model, pretrained=False).eval(), given.method)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        first = {name: turns.clock(run, pictures) for name, run in ways.items()}
        for number in range(given.rounds + 1):
            for name, run in ways.items():
                spent = turns.clock(run, pictures)
                if number:
                    seconds[name].append(spent)
    ratio = turns.speed_up(seconds)
    gain = ratio["compressed, compiled"] / ratio["compressed"]
    print(f"compiling the compressed model gains {gain:.2f} x")
    bare = statistics.median(seconds["bare"])
    turns.write(
        given,
        seconds,
        speed_up={name: round(value, 3) for name, value in ratio.items() if name != "bare"},
        gain_of_compiling_the_compressed=round(gain, 3),
        compiling_in_forwards_of_bare={
            name: round(value / bare) for name, value in first.items() if "compiled" in name
        },
    )


if __name__ == "__main__":
    main()
