"""EVS: keep the first frame of a clip and the cells that change most from one frame to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.clips import ClipMethod, by_frame
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.site import Counts
from ..core.view import TokenView

FIRST = 255.0
"""Score of the first frame, above all changes (at most 2)."""


def change_of_cells(clip: Tensor) -> Tensor:
    """How much each cell of a clip differs from the same cell one frame before (arXiv 2510.14624).

    Args:
        clip: `[B, T, M, C]`, tokens of T frames of M cells, any floating dtype.

    Returns:
        fp32 `[B, T, M]`: one minus the cosine, 255 in the first frame. A zero token has cosine 0 with any; one
        with NaN has NaN.
    """
    unit = kernels.unit_rows(clip)
    change = 1.0 - (unit[:, 1:] * unit[:, :-1]).sum(-1)
    first = torch.where(unit[:, :1].isnan().any(-1), float("nan"), FIRST)
    return torch.cat([first, change], 1)


@register_method
@dataclass(eq=False)
class EVS(ClipMethod):
    """Keeps a clip's first frame and, over all others, the cells that changed most since the frame before.

    It acts on clips at the language model's input and leaves pictures alone. The number that stays is that of the
    serving engines; frames get what they changed, possibly nothing.

    Algorithm:
        1. ``d_{t,m} = 1 - cos(x_{t,m}, x_{t-1,m})`` for t >= 1, whether that cell is kept or not; ``d_{0,m} = 255``.
        2. ``k = max(M, int(N (1 - rate)))`` of the N = T M tokens, in floating point and cut off.
        3. The k tokens of largest d stay, in their order; the earlier one of equals.

    Args:
        rate: share of a clip that goes, in [0, 1); the engines' ``video_pruning_rate``.
        source: ``"clips"``, what the host calls a clip, or ``"pictures"``: all pictures of a prompt, in order, are
            frames of one clip (InternVL's and SmolVLM's processors write videos so).
        positions: ``"keep"`` or ``"renumber"`` position ids; None is the model's default: kept where they are places
            in time and picture (M-RoPE).
    """

    paper = "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (NVIDIA, 2025)"
    arxiv = "2510.14624"
    code = "https://github.com/vllm-project/vllm"
    parity = "index-exact with vLLM's and transformers' selection (evs_*)"
    deviations = (
        "Cosines are computed in fp32; engines use the model's dtype, and in bf16 cells that barely change are kept "
        "by their order in time alone: counts are equal, sets are not.",
        "A token with NaN loses; engines keep it before the first frame.",
        "Each clip is one clip; transformers' own takes all clips of a call for one.",
        "The authors' own code is not public: this is what engines run. The paper keeps the first frame on top of the "
        "share, engines inside it.",
    )
    aliases = (Alias("video_pruning_rate", "rate", "vLLM and SGLang"), Alias("q", "rate"))

    rate: float = 0.75
    source: str = "clips"
    positions: str | None = None

    def reduce(self, view: TokenView) -> Reduction | None:
        """The largest changes; None for pictures."""
        k = self.count(view.counts)
        clip = self.whole_clip(view.counts)
        if clip is None or k == view.counts.n:
            return None
        return Reduction(keep_top(change_of_cells(by_frame(view, clip)).flatten(1), k))

    def count(self, counts: Counts) -> int:
        """As engines count; all of a picture."""
        clip = self.whole_clip(counts)
        return counts.n if clip is None else max(clip[1], self.tokens_that_stay(counts.n))
