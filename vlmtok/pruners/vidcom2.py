"""VidCom2: more tokens for frames that differ from their clip, and inside a frame those that differ from both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias, rest_of
from ..core.clips import ClipMethod, by_frame
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import chosen_first
from ..core.settings import check_choice, check_keep
from ..core.site import Counts
from ..core.view import TokenView

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of the five Gaussians whose sum is the similarity."""
TEMPERATURE = 0.01
COUNTS = ("exact", "released")


def redundancy(clip: Tensor) -> tuple[Tensor, Tensor]:
    """How alike each token is to its clip, and to its frame (arXiv 2505.14454).

    Only the half of the channels that varies least over the clip is read. Similarity with a centre, the mean of the
    normalised tokens, is a sum of five Gaussians of the distance: between 0 and 5.

    Args:
        clip: `[B, T, M, C]`, tokens of T frames of M cells, any floating dtype; no NaN.

    Returns:
        Similarity with the clip's centre and with the frame's, fp32 `[B, T, M]` both.
    """
    tokens = clip.float()
    kept = max(1, clip.shape[-1] // 2)
    variance = tokens.flatten(1, 2).var(1, correction=0)
    channels = variance.argsort(dim=-1, stable=True)[:, :kept]
    index = channels[:, None, None].expand(*tokens.shape[:3], kept)
    unit = kernels.unit_rows(tokens.gather(-1, index))
    return _gaussians(unit, unit.mean((1, 2), keepdim=True)), _gaussians(unit, unit.mean(2, keepdim=True))


def _gaussians(unit: Tensor, centre: Tensor) -> Tensor:
    distance = (unit - centre).square().sum(-1)
    return torch.stack([(-distance / (2.0 * width)).exp() for width in WIDTHS]).sum(0)


def frame_budgets(alike: Tensor, base: float) -> Tensor:
    """How many tokens each frame keeps.

    Args:
        alike: fp32 `[B, T, M]`, similarity of tokens with their clip's centre.
        base: share that stays.

    Returns:
        int64 `[B, T]`, from 1 to M; rounded half to even.
    """
    unique = -alike.mean(-1)
    weight = ((unique - unique.amax(1, keepdim=True)) / TEMPERATURE).softmax(1)
    scale = (base * (1.0 + weight - weight.mean(1, keepdim=True))).clamp(max=1.0)
    cells = alike.shape[-1]
    return (scale * cells).round().long().clamp(1, cells)


def _share_that_stays(value: Any, settings: Mapping[str, Any]) -> float:
    return rest_of(check_keep(float(value) if value == 1 else value, "VidCom2", "R_RATIO"))


@register_method
@dataclass(eq=False)
class VidCom2(ClipMethod):
    """Keeps, of each frame of a clip, the tokens least like the clip and the frame; unusual frames keep more of theirs.

    It acts on clips at the language model's input and leaves pictures alone.

    Algorithm:
        1. Of all channels the half of smallest variance over the clip; ``y`` = tokens there, normalised.
        2. ``G(y, c) = sum_a exp(-|y - c|^2 / (2 a))``, a = 1/8, 1/4, 1/2, 1, 2; ``A = G(y, mean of the clip)``,
           ``B = G(y, mean of the frame)``.
        3. ``u_t = -mean_m A_{t,m}``, ``p = softmax(u / 0.01)`` over frames; frame t gets
           ``k_t = round(min(1, (1 - rate) (1 + p_t - mean p)) M)`` tokens, at least 1.
        4. Frame t keeps the k_t tokens of smallest ``A + B``, in their order.
        5. ``counts="exact"``: with ``k = max(T, int(N (1 - rate)))`` in all, over the whole clip tokens of largest
           ``A + B`` leave, or dropped ones of smallest come back.

    Args:
        rate: share of a clip that goes, in [0, 1).
        counts: ``"exact"``, the number that vLLM keeps, known beforehand, or ``"released"``, the paper's code, whose
            number depends on the clip.
        source: ``"clips"``, what the host calls a clip, or ``"pictures"``: all pictures of a prompt, in order, are
            frames of one clip (InternVL's and SmolVLM's processors write videos so).
        positions: ``"keep"`` or ``"renumber"`` position ids; None is the model's default: kept where they are places
            in time and picture (M-RoPE).
    """

    paper = "Video Compression Commander: Plug-and-Play Inference Acceleration for VideoLLMs (EMNLP 2025)"
    arxiv = "2505.14454"
    code = "https://github.com/xuyang-liu16/VidCom2"
    parity = "index-exact with the released selection and with vLLM's count (vidcom2_*)"
    deviations = (
        "Computed in fp32; release and engines use the model's dtype, in which bf16's steps are as wide as the "
        "temperature: a frame's budget moves by up to 3 tokens, and about one token in ten differs.",
        "Row separators of a clip (LLaVA-Video) stay where they are; the release moves them behind each frame's cells.",
        "A token with NaN is dropped first and counts as zero for the others.",
        "A rate of 0 keeps everything; the release drops some tokens of an uneven clip even then.",
        "Paper and code differ (cosine of all channels, rounding up): this is the code.",
    )
    aliases = (
        Alias("video_pruning_rate", "rate", "vLLM"),
        Alias("q", "rate", "vLLM"),
        Alias("R_RATIO", "rate", "the released code", "1 - R_RATIO", _share_that_stays),
    )

    rate: float = 0.75
    counts: str = "exact"
    source: str = "clips"
    positions: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.counts, "VidCom2", "counts", COUNTS)

    def reduce(self, view: TokenView) -> Reduction | None:
        """Budgets of the frames, then the least redundant tokens of each; None for pictures."""
        k = self.count(view.counts)
        shape = self.whole_clip(view.counts)
        if shape is None or k == view.counts.n:
            return None
        bad = view.tokens.isnan().any(-1)
        clip = by_frame(view, shape)
        alike, inside = redundancy(torch.where(bad.unflatten(1, shape).unsqueeze(-1), 0.0, clip))
        score = torch.where(bad, float("inf"), (alike + inside).flatten(1))
        budget = frame_budgets(alike, 1.0 - self.rate)
        rank = score.unflatten(1, shape).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        chosen = (rank < budget.unsqueeze(-1)).flatten(1)
        if k is None:
            return self._ragged(chosen, shape)
        order = score.argsort(dim=1, stable=True)
        first = (~chosen).gather(1, order).to(torch.int8).argsort(dim=1, stable=True)
        return Reduction(order.gather(1, first)[:, :k].sort(dim=1).values)

    def _ragged(self, chosen: Tensor, shape: tuple[int, int]) -> Reduction:
        n = chosen.shape[1]
        most = min(n, int((1.0 - self.rate) * n + shape[0] / 2) + shape[0])
        slots, valid = chosen_first(chosen)
        return Reduction(slots[:, :most], valid=valid[:, :most])

    def count(self, counts: Counts) -> int | None:
        """As vLLM counts; all of a picture; None where the release's rounding decides."""
        shape = self.whole_clip(counts)
        if shape is None or self.rate == 0:
            return counts.n
        if self.counts == "released":
            return None
        return min(counts.n, max(shape[0], self.tokens_that_stay(counts.n)))
