"""A method of one's own in a file outside the package: see docs/howto/own-method.md.

python examples/my_method.py        # registers it, wraps a tiny random ViT, prints the report
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import vlmtok


@vlmtok.register_method
@dataclass(eq=False)
class NormKeep(vlmtok.Method):
    """Keeps the tokens of largest norm.

    Args:
        keep: share (float) or count (int) of a picture's tokens.
    """

    paper = "an example"

    keep: float | int = 0.5

    def sites(self, layout: vlmtok.Layout) -> list[vlmtok.Site]:
        """The language model's input, or the middle of a lone tower."""
        if layout.has("projected"):
            return [vlmtok.Site("projected")]
        middle = layout.stage("vision").depth // 2
        return [vlmtok.Site("vision", middle, "mid")]

    def reduce(self, view: vlmtok.TokenView) -> vlmtok.Reduction:
        """The largest norms, in the order of the tokens."""
        score = view.tokens.float().norm(dim=-1)
        order = score.argsort(dim=1, descending=True, stable=True)
        keep = order[:, : self.count(view.counts)].sort(dim=1).values
        return vlmtok.Reduction(keep)

    def count(self, counts: vlmtok.Counts) -> int:
        """As `keep` says."""
        return vlmtok.keep_count(self.keep, counts.n)


def main() -> None:
    """Wraps a small random ViT."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=10).eval()
    with torch.no_grad(), vlmtok.compress(model, NormKeep(keep=0.25)) as run:
        model(torch.randn(2, 3, 224, 224))
    print(run.report())


if __name__ == "__main__":
    main()
