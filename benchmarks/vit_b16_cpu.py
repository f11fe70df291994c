"""ViT-B/16 at 224 px on a CPU: ToMe, PiToMe and a merger that merges nothing, against the bare model.

    python benchmarks/vit_b16_cpu.py

All arms run in turn, round after round, in one process, so that whatever the machine does meets all; a figure is the
ratio of medians. A ceiling arm runs the bare blocks on as many tokens as the method leaves, cut off for nothing,
neither matched nor merged nor weighed in attention: what no implementation on the same matmuls can exceed. The result
goes to ``benchmarks/results/vit_b16_cpu.json``. Needs timm, no download.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import vlmtok


@dataclass(eq=False)
class Nothing(vlmtok.ToMe):
    """ToMe's hooks at every layer, and no reduction: what the surgery itself costs."""

    def reduce(self, view: vlmtok.TokenView) -> None:
        """Looks at the keys and leaves the row as it is."""
        view.signal("keys")


ARMS: dict[str, Any] = {
    "bare": None,
    "ToMe(r=16)": vlmtok.ToMe(r=16),
    "PiToMe(ratio=0.9)": vlmtok.PiToMe(ratio=0.9),
    "no reduction": Nothing(r=16),
}
BOUNDED = ("ToMe(r=16)", "PiToMe(ratio=0.9)")


@dataclass(eq=False)
class Ceiling:
    """A ViT whose rows get shorter for nothing.

    Attributes:
        model: a timm VisionTransformer.
        counts: tokens that are left between attention and MLP, layer by layer.
    """

    model: Any
    counts: list[int]

    @classmethod
    def of(cls, model: Any, method: vlmtok.Method, pictures: torch.Tensor) -> Ceiling:
        """With the counts of a method."""
        with vlmtok.compress(model, method) as run:
            model(pictures[:1])
            return cls(model, [layer["mlp"] for layer in run.report().to_dict()["layers"]])

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """The logits of some other picture; only its cost means something."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pictures))))
        for block, count in zip(model.blocks, self.counts):
            x = (x + block.attn(block.norm1(x)))[:, :count]
            x = x + block.mlp(block.norm2(x))
        return model.forward_head(model.norm(x))


def measure(rounds: int, batch: int, threads: int, model_name: str) -> dict[str, list[float]]:
    """Seconds of a forward, by arm, one each round; a first round warms up and is not counted."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(model_name, pretrained=False).eval()
    pictures = torch.randn(batch, 3, 224, 224)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    with torch.inference_mode():
        ceilings = {name: Ceiling.of(model, ARMS[name], pictures) for name in BOUNDED}
        seconds.update({f"ceiling of {name}": [] for name in ceilings})
        for number in range(rounds + 1):
            for name, method in ARMS.items():
                run = None if method is None else vlmtok.compress(model, method)
                spent = clock(model, pictures)
                if run is not None:
                    run.remove()
                if number:
                    seconds[name].append(spent)
                if name in ceilings:
                    spent = clock(ceilings[name], pictures)
                    if number:
                        seconds[f"ceiling of {name}"].append(spent)
    return seconds


def clock(call: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call(pictures)
    return time.perf_counter() - start


def main() -> None:
    """Measures, prints the ratios, writes them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vit_b16_cpu.json")
    options = parser.parse_args()
    seconds = measure(options.rounds, options.batch, options.threads, options.model)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {name: median["bare"] / value for name, value in median.items()}
    for name, value in ratio.items():
        print(f"{name:30} {value:5.2f} x")
    result = {
        "model": options.model,
        "batch": options.batch,
        "threads": options.threads,
        "dtype": "float32",
        "rounds": options.rounds,
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vlmtok": vlmtok.__version__,
        "speed_up": {name: round(value, 3) for name, value in ratio.items() if name != "bare"},
        # Of every arm's rounds as a share of the bare median: how quiet the machine was.
        "spread": {name: [round(v / median["bare"], 3) for v in sorted(values)] for name, values in seconds.items()},
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
