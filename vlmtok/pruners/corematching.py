"""CoreMatching: keep the visual tokens that have the most neurons of an MLP on that a token of the question has on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.between_layers import DropsBetweenLayers
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView

PLACES = ("decoder",)
_LAYER, _DEPTH = 5, 32


def elbow(score: Tensor) -> Tensor:
    """Where falling scores bend: the score farthest from the straight line between the largest and the least.

    Args:
        score: `[B, N]`, finite; counts of any dtype.

    Returns:
        float64 `[B, 1]`, one of the scores; the first of several that are equally far.
    """
    falling = score.double().sort(dim=1, descending=True).values
    place = torch.arange(score.shape[1], dtype=torch.float64, device=score.device)
    # Times a length that is one for all; of counts it is a whole number, so that equal distances are equal.
    rise = falling[:, -1:] - falling[:, :1]
    apart = (rise * place - (score.shape[1] - 1) * (falling - falling[:, :1])).abs()
    return falling.gather(1, apart.argmax(1, keepdim=True))


def core_tokens(score: Tensor) -> Tensor:
    """Tokens above the elbow; at least one, the first of largest score.

    Args:
        score: `[B, N]`, finite.

    Returns:
        bool `[B, N]`.
    """
    core = score.double() > elbow(score)
    best = torch.zeros_like(core).scatter(1, score.argmax(1, keepdim=True), 1)
    return core | (best & ~core.any(1, keepdim=True))


@register_method
@dataclass(eq=False)
class CoreMatching(DropsBetweenLayers):
    """Keeps the visual tokens whose active neurons match those of a token of the question, inside the language model.

    A neuron is on where the input of the MLP's last projection is positive. How many tokens stay follows from the
    scores, unless `keep` says it. All pictures of a prompt are scored together. Where no text stands behind the first
    of them nothing leaves, unless `keep` says how many: then they are compared with the prompt's last token. The
    release's other form, which takes entries out of the caches of several layers, needs a stage that is not there yet.
    Neurons are not skipped, which the paper proposes for decoding and the release does not do.

    Algorithm:
        1. ``P_j``: which inputs of the last projection of layer `layer`'s MLP are positive, for token j.
        2. ``c_j = |P_j and P_r|``, r the row of the text that `reference` counts from its end.
        3. The c fall from y_0 to y_(n-1); the elbow is the y_i farthest from the line between (0, y_0) and
           (n - 1, y_(n-1)).
        4. Tokens with c_j above the elbow stay, at least one; or, with `keep`, the k of largest c_j.

    Args:
        keep: None for the elbow, or the share (float) or count (int) of the visual tokens that stay.
        layer: 0-based layer whose MLP decides and at whose end tokens leave; None is the paper's 5 of 32 as a share of
            the depth.
        reference: place of the row that is compared with, from the text's end: -5 is the last word of the question in
            front of LLaVA's ``ASSISTANT:``. A shorter text gives its first row.
        at: ``"decoder"``.
        positions: ``"keep"`` the position ids of what stays, or ``"renumber"`` them.
    """

    paper = (
        "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive "
        "Acceleration of Vision-Language Models (ICML 2025)"
    )
    arxiv = "2505.19235"
    code = "https://github.com/wangqinsi1/2025-ICML-CoreMatching"
    parity = "exact with the released counts, elbow and core tokens (corematching_*)"
    deviations = (
        "Tokens leave once, for all layers that follow, as in the paper; the release sets their keys and values to "
        "zero in layers 5 to 18, each by itself, and drops nothing.",
        "Tokens are compared with one row, as released; the paper compares them with the neurons that most of the "
        "sentence has on.",
        "Core neurons are not used, neither here nor in the release.",
        "The visual tokens are those of the prompt, of any number of pictures; the release hard-codes one span.",
        "At least one token stays; the release keeps none of tokens with equal counts.",
    )
    caveats = (
        "Early layers need not know the question: on scenes-llava, whose neurons behind layer 2 of 16 match by what is "
        "common to all patches, a quarter of the tokens answers 16 % of 300 questions, a random quarter 49 %.",
    )
    budget_parameter = "keep"
    scope = "sample"

    keep: float | int | None = None
    layer: int | None = None
    reference: int = -5
    at: str = "decoder"
    positions: str = "keep"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep, "CoreMatching")
        if self.layer is not None:
            check_range(self.layer, "CoreMatching", "layer", 0, kind=int)
        check_range(self.reference, "CoreMatching", "reference", high=-1, kind=int)
        check_choice(self.at, "CoreMatching", "at", PLACES)
        check_choice(self.positions, "CoreMatching", "positions", POSITIONS)

    def sites(self, layout: Layout) -> list[Site]:
        """The end of one layer, behind which another must follow."""
        depth = layout.stage("decoder", "CoreMatching").depth
        own = min(int(depth * _LAYER / _DEPTH + 0.5), max(depth - 2, 0))
        return [
            Site("decoder", layer, "end", ("activation_match",), positions=self.positions)
            for layer in layout.layers("decoder", own if self.layer is None else self.layer, "CoreMatching")
        ]

    def reduce(self, view: TokenView) -> Reduction | None:
        """Tokens above the elbow, or as many as `keep` says; slots in the order of the tokens."""
        n, match = view.counts.n, view.signal("activation_match")
        text = match.shape[2] - 1
        if self.keep is not None:
            k = keep_count(self.keep, n)
            return None if k == n else Reduction(keep_top(self._score(match, text), k))
        if n == 1 or not text:
            return None
        score = self._score(match, text)
        core = core_tokens(score)
        # What is at the elbow goes, so that one slot fewer than tokens is enough; behind those that stay, the best.
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        order = torch.where(core, torch.arange(n, device=core.device) - n, rank).argsort(dim=1)[:, : n - 1]
        return Reduction(order, valid=core.gather(1, order))

    def count(self, counts: Counts) -> int | None:
        """As `keep` says; None where the elbow does."""
        return None if self.keep is None else keep_count(self.keep, counts.n)

    def _score(self, match: Tensor, text: int) -> Tensor:
        """Neurons that each token shares with the reference, fp32 `[B, N]`; NaN counts as none."""
        row = max(text + self.reference, 0) if text else 0
        return match[..., row].float().nan_to_num(nan=-1.0)
