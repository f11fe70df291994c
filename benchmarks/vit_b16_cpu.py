"""ViT-B/16 at 224 px on a CPU: ToMe, PiToMe and a merger that merges nothing, against the bare model.

    python benchmarks/vit_b16_cpu.py

All arms run in turn, round after round, in one process, so that whatever the machine does meets all; a figure is the
ratio of medians. A ceiling arm runs the bare blocks on as many tokens as the method leaves, cut off for nothing,
neither matched nor merged nor weighed in attention: what no implementation on the same matmuls can exceed. The result
goes to ``benchmarks/results/vit_b16_cpu.json``. Needs timm, no download.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any

import timm
import torch
import turns

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


def measure(rounds: int, batch: int, model_name: str) -> dict[str, list[float]]:
    """Seconds of a forward, by arm, one each round; a first round warms up and is not counted."""
    model = timm.create_model(model_name, pretrained=False).eval()
    pictures = torch.randn(batch, 3, 224, 224)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    with torch.inference_mode():
        ceilings = {name: Ceiling.of(model, ARMS[name], pictures) for name in BOUNDED}
        seconds.update({f"ceiling of {name}": [] for name in ceilings})
        for number in range(rounds + 1):
            for name, method in ARMS.items():
                run = None if method is None else vlmtok.compress(model, method)
                spent = turns.clock(model, pictures)
                if run is not None:
                    run.remove()
                if number:
                    seconds[name].append(spent)
                if name in ceilings:
                    spent = turns.clock(ceilings[name], pictures)
                    if number:
                        seconds[f"ceiling of {name}"].append(spent)
    return seconds


def main() -> None:
    """Measures, prints the ratios, writes them down."""
    given = turns.options(__doc__, rounds=9, model="vit_base_patch16_224", result="vit_b16_cpu.json")
    seconds = measure(given.rounds, given.batch, given.model)
    ratio = turns.speed_up(seconds)
    turns.write(
        given,
        seconds,
        speed_up={name: round(value, 3) for name, value in ratio.items() if name != "bare"},
        major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    )


if __name__ == "__main__":
    main()
