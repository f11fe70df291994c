"""TransPrune: keep the visual tokens whose representations change most, and those that the instruction looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.between_layers import DropsBetweenLayers
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_range, check_schedule, check_schedule_layers, share_of_entered
from ..core.site import POSITIONS, Counts, Layout, Site, StageLayout
from ..core.view import TokenView
from ..errors import MissingSignal, ParameterError
from .fastv import last_row_score

DIRECTIONS = ("released", "paper")
_EPS = 1e-8


def transition_variation(transition: Tensor, direction: str = "released") -> Tensor:
    """Token transition variation of modules (arXiv 2507.20630, eq. 1 and 2).

    A module scores a token by the ratio of the norms of its output and input, times the softmax over the row of how
    far it turns the token.

    Args:
        transition: `[..., 2, L]`, for each token of the whole row the norm ratio and the cosine of a module's output
            and input (the signal ``transition`` holds both modules of a layer).
        direction: ``"released"`` weighs by softmax(1 - cos), ``"paper"`` by softmax(1 - abs(cos)).

    Returns:
        fp32 `[..., L]`; a layer's value is the sum over its two modules.
    """
    ratio, cosine = transition.float().unbind(-2)
    if direction == "paper":
        cosine = cosine.abs()
    turn = torch.where(cosine.isnan(), float("-inf"), 1.0 - cosine)
    return ratio * turn.softmax(-1)


def instruction_attention(text_attention: Tensor) -> Tensor:
    """Instruction-guided attention: what the text behind the pictures pays each token (arXiv 2507.20630, eq. 5).

    Args:
        text_attention: `[B, H, T, N]`, softmax over the whole row, cut to the visual tokens; T at least 1.

    Returns:
        fp32 `[B, N]`, the mean over heads and text rows.
    """
    return text_attention.float().mean((1, 2))


def combined_score(variation: Tensor, attention: Tensor, alpha: float = 0.5) -> Tensor:
    """Weighs the two criteria, each normalised to sum 1 over the tokens that are left.

    Args:
        variation: `[B, N]`, accumulated transition variation.
        attention: `[B, N]`, instruction-guided attention.
        alpha: weight of `variation`; `attention` has 1 - alpha.

    Returns:
        fp32 `[B, N]`; higher means keep.
    """
    return alpha * _share(variation) + (1.0 - alpha) * _share(attention)


def _share(score: Tensor) -> Tensor:
    score = score.float()
    return score / (score.nansum(-1, keepdim=True) + _EPS)


@register_method
@dataclass(eq=False)
class TransPrune(DropsBetweenLayers):
    """Prunes visual tokens in three steps inside the language model, by token transition and instruction attention.

    Transition variation (how much attention and MLP scale and turn a token) is summed up from layer to layer;
    instruction-guided attention is that of the text behind the pictures, computed at a cut with the norm, queries and
    keys of the layer that comes next. Where no text follows the pictures, transition counts alone. All pictures of a
    prompt share one budget.

    Algorithm:
        1. A module (attention, MLP) with input u and output w: ``v_n = (|w_n| / |u_n|) softmax_n(1 - cos(w_n, u_n))``.
        2. ``V_n`` sums v_n over both modules and over the layers of `accumulate`.
        3. At a cut ``g_n = mean over heads and text rows of attention[t, n]``, by the layer that comes next.
        4. ``S_n = alpha V_n / sum V + (1 - alpha) g_n / sum g``.
        5. The ``max(1, floor(ratio_i * entered))`` tokens of highest S_n stay, in their order.

    Args:
        alpha: weight of the transition; 1 is transition only, 0 attention only.
        ratios: share of the visual tokens that entered the decoder, kept from each cut on, rounded down.
        layers: 0-based layers that are the first to run with fewer tokens ("after layer 7" of the paper is layer 7
            here). They are the paper's for 32 layers and must exist.
        accumulate: 0-based layers whose transitions are summed up; None means every layer from the one before the
            first cut to the one before the last (6 to 11, the paper's 7 to 12).
        direction: ``"released"`` weighs a turn by softmax(1 - cos), ``"paper"`` by softmax(1 - abs(cos)).
        positions: ``"renumber"`` the position ids of what stays, as released, or ``"keep"`` them. None renumbers where
            the model can, and keeps them where they are places in a picture (M-RoPE).
    """

    paper = "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (CVPR 2026)"
    arxiv = "2507.20630"
    code = "https://github.com/liaolea/TransPrune"
    parity = (
        "index-exact with the released scores and cuts; end to end 1e-4 on a Llama, greedy tokens equal (transprune_*)"
    )
    deviations = (
        "The softmax over turns is per sample; the release takes it over the batch (and fails for more than one).",
        "Keys and queries only are computed ahead, and queries only of text rows; the release projects all tokens.",
        "A prompt that ends with the picture has no instruction: transition counts alone (alpha=0: the last row's "
        "attention); the release gets NaN.",
        "All pictures of a prompt are pruned; the release prunes the first and takes the others for text.",
        "At least one token stays; equal scores go to the lowest index; scores are fp32.",
    )
    budget_parameter = "ratios"
    scope = "sample"
    joins_cuts = True

    alpha: float = 0.5
    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    layers: tuple[int, ...] = (7, 9, 12)
    accumulate: tuple[int, ...] | None = None
    direction: str = "released"
    positions: str | None = None

    def __post_init__(self) -> None:
        check_range(self.alpha, "TransPrune", "alpha", 0, 1)
        if self.layers is None:
            raise ParameterError("TransPrune: layers=None is not possible; name the first layer of each step")
        check_schedule(self.layers, self.ratios, "TransPrune")
        if self.accumulate is not None:
            check_schedule_layers(self.accumulate, "TransPrune", "accumulate", low=0)
            if self.alpha > 0 and min(self.accumulate) >= min(self.layers):
                raise ParameterError(
                    f"TransPrune: accumulate={self.accumulate!r} has no layer before the first cut at layer "
                    f"{min(self.layers)}; name one, or set alpha=0"
                )
        check_choice(self.direction, "TransPrune", "direction", DIRECTIONS)
        check_choice(self.positions, "TransPrune", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """Ends of the accumulated layers (they only look) and starts of the layers of `layers`."""
        needs: tuple[str, ...] = () if self.alpha == 1 else ("text_attention",)
        if self.alpha == 0:
            needs += ("last_attention",)
        cuts = [
            Site("decoder", layer, "start", needs, positions=layout.positions("decoder", self.positions))
            for layer in layout.layers("decoder", self.layers, "TransPrune")
        ]
        looks = [
            Site("decoder", layer, "end", ("transition",))
            for layer in layout.layers("decoder", self._watched(layout.stages["decoder"]), "TransPrune")
        ]
        return looks + cuts

    def reduce(self, view: TokenView) -> Reduction | None:
        """Looks at the end of a layer, cuts at a start."""
        if view.site.point == "end":
            self._look(view)
            return None
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        return Reduction(keep_top(self._score(view), k))

    def count(self, counts: Counts) -> int:
        """The cut's share of the tokens that entered; all where the method only looks."""
        ratio = dict(zip(self.layers, self.ratios)).get(counts.layer)
        if ratio is None or counts.site.point != "start":
            return counts.n
        return share_of_entered(counts, ratio)

    def _watched(self, decoder: StageLayout) -> list[int]:
        """Layers whose transitions some cut reads; cuts whose layer has no attention rows are made at a later one."""
        if self.alpha == 0:
            return []
        first, last = min(self.layers), max(self.layers)
        if self.alpha < 1:
            first, last = (decoder.seeing(layer, "start") or layer for layer in (first, last))
        if self.accumulate is None:
            return list(range(first - 1, last))
        return [layer for layer in self.accumulate if layer < last]

    def _look(self, view: TokenView) -> None:
        row = transition_variation(view.signal("transition"), self.direction).sum(1)
        seen = row.gather(1, view.columns)
        # In `state` the core gathers the sum with every cut, which equals gathering each layer's value.
        view.state["variation"] = view.state["variation"] + seen if "variation" in view.state else seen

    def _score(self, view: TokenView) -> Tensor:
        text = view.maybe("text_attention") if self.alpha < 1 else None
        attention = None if text is None or text.shape[2] == 0 else instruction_attention(text)
        if self.alpha == 0:
            return last_row_score(view.signal("last_attention")) if attention is None else attention
        if "variation" not in view.state:
            raise MissingSignal(f"TransPrune has observed no layer before {view.site}")
        variation = view.state["variation"]
        return variation if attention is None else combined_score(variation, attention, self.alpha)
