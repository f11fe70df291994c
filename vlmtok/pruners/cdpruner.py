"""CDPruner: keep visual tokens that are diverse and relevant to the instruction, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import check_choice, check_flag, check_keep, check_range, keep_count
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView

_EPS = 1e-6


def instruction_relevance(x: Tensor, text: Tensor) -> Tensor:
    """How well each visual token fits a text: the mean of its cosines with the text's embeddings.

    Args:
        x: `[B, N, D]`, visual tokens in a space shared with the text, any floating dtype.
        text: `[M, D]` or `[B, M, D]`, embeddings of the text's M segments.

    Returns:
        fp32 `[B, N]`, higher is closer; CLIP's patch tokens want it negated (see `CDPruner`).
    """
    with kernels.exact(x.device):
        target = kernels.unit_rows(text)
        return (kernels.unit_rows(x) @ target.transpose(-1, -2)).mean(-1)


def scale_relevance(relevance: Tensor, *, negate: bool = False, theta: float | None = None) -> Tensor:
    """Relevance brought to (0, 1] by the least and greatest value of its row (arXiv 2506.10967).

    Args:
        relevance: `[B, N]`, any floating dtype.
        negate: whether low values mean relevant.
        theta: None, or in [0, 1): exp(theta / (2 (1 - theta)) r) of the scaled value; small values weigh diversity
            more.

    Returns:
        fp32 `[B, N]`, positive; ones where a row is constant; NaN counts as least relevant.
    """
    value = -relevance.float() if negate else relevance.float()
    nan = value.isnan()
    low = torch.where(nan, float("inf"), value).amin(1, keepdim=True)
    high = torch.where(nan, float("-inf"), value).amax(1, keepdim=True)
    span = high - low
    scaled = (torch.where(nan, low, value) - low + _EPS) / span
    scaled = torch.where(span > 0, scaled, 1.0)
    return scaled if theta is None else torch.exp(theta / (2.0 * (1.0 - theta)) * scaled)


def dpp_map(x: Tensor, k: int, relevance: Tensor | None = None, valid: Tensor | None = None, split: int = 1) -> Tensor:
    """Greedy choice of k tokens that maximises log det of diag(r) L diag(r), L the tokens' cosines.

    See `vlmtok.kernels.greedy_determinant`, which it is. Where everything left is in the span of the chosen tokens (k
    above the rank), the most relevant tokens follow.

    Args:
        x: `[B, N, D]`, visual embeddings, any floating dtype.
        k: how many, at most N.
        relevance: floating `[B, N]`, not negative; None means ones, which leaves diversity alone.
        valid: bool `[B, N]`, candidates; None means all. A row with fewer than k goes on with the others.
        split: 1, or 2 to choose in two halves of the tokens apart, ``ceil(k / 2)`` in the first.

    Returns:
        int64 `[B, k]`, in the order chosen, without repeats. The lowest index wins a tie; NaN rows come behind the
        other candidates.
    """
    return kernels.greedy_determinant(x, k, relevance=relevance, valid=valid, split=split)[0]


@register_method
@dataclass(eq=False)
class CDPruner(Method):
    """Keeps a set of each crop's tokens that is diverse and fits the instruction: greedy MAP of a conditional DPP.

    Relevance comes from the signal ``relevance`` where you give one, `[B, N]` and higher for closer: for LLaVA the
    cosines of CLIP's projected patches with CLIP's embedding of the question (`instruction_relevance`). Otherwise it is
    the cosine of each token with the mean input embedding of the text behind the picture, as the release does for
    models without a paired text tower. Without such text only diversity counts.

    Algorithm:
        1. The signal ``relevance``, else ``r_i = cos(x_i, t)``, t the mean embedding of the text behind the picture.
        2. With `negate` its sign turns. Scaled within a crop: ``r_i = (r_i - min r + 1e-6) / (max r - min r)``.
        3. ``L_ij = r_i cos(x_i, x_j) r_j``; wanted are the k tokens S with the greatest ``det L_S``.
        4. Greedy: take ``p = argmax_i r_i^2 d_i``, d_i the variance that the chosen ones leave of i, at first 1.
        5. Then ``e_i = (cos(x_p, x_i) - c_p . c_i) / sqrt(d_p)``, append e_i to c_i, ``d_i = d_i - e_i^2``.

    Args:
        keep: share (float) or count (int) of a crop's tokens that stay.
        negate: take low similarity as relevant, as released: CLIP's patch tokens correlate inversely with the text.
            The paper's formula has no minus.
        theta: None, or in [0, 1): softens relevance to exp(theta / (2 (1 - theta)) r).
        positions: ``"renumber"`` or ``"keep"`` the position ids; None is the model's default.
        split: 1, or 2 to choose half of the tokens among the first half of a crop's and half among the rest, as some
            inference engines do. It is another choice, in half the rounds: what is alike across the halves stays twice.
    """

    paper = "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (NeurIPS 2025)"
    arxiv = "2506.10967"
    code = "https://github.com/Theia-4869/CDPruner"
    parity = "index-exact with the released selection (cdpruner_*)"
    caveats = (
        "With negate=True, as released, it loses to Random on tiny-llava (20.0 % against 49.2 % at 16 of 144 "
        "tokens): the minus is made for CLIP, whose patches correlate inversely with the text; there they "
        "correlate with the words, and what is asked for goes first. negate=False answers 98.8 %.",
    )
    deviations = (
        "Relevance is scaled within each crop; the release scales over the whole batch, so that a crop's tokens depend "
        "on the pictures beside it.",
        "Constant relevance leaves diversity alone; the release divides by zero and keeps too few.",
        "Beyond the rank of the kernel the most relevant tokens follow; the release takes roots of negative numbers.",
        "Row separators of multi-crop pictures are kept last.",
        "Text behind the picture includes the prompt's template.",
        "split=2 is that of inference engines, neither the paper's nor the release's.",
    )
    scope = "part"
    aliases = (Alias("visual_token_num", "keep", "the released code"), Alias("k", "keep"))
    budget_parameter = "keep"

    keep: float | int = 0.111
    negate: bool = True
    theta: float | None = None
    positions: str | None = None
    split: int = 1

    def __post_init__(self) -> None:
        check_keep(self.keep, "CDPruner")
        check_range(self.split, "CDPruner", "split", 1, 2, int)
        check_flag(self.negate, "CDPruner", "negate")
        if self.theta is not None:
            check_range(self.theta, "CDPruner", "theta", 0, 0.999)
        check_choice(self.positions, "CDPruner", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input; a model that offers no text needs the user's ``relevance``."""
        layout.stage("projected", "CDPruner")
        need = "text" if layout.gives("projected", "text") else "relevance"
        return [Site("projected", needs=(need,), positions=self.positions)]

    def reduce(self, view: TokenView) -> Reduction | None:
        """Relevance, then the greedy choice; slots in the order of the tokens."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        relevance = view.maybe("relevance")
        if relevance is None:
            text = view.maybe("text")
            if text is not None and text.shape[1]:
                relevance = instruction_relevance(view.tokens, text.float().mean(1, keepdim=True))
        if relevance is not None:
            relevance = scale_relevance(relevance, negate=self.negate, theta=self.theta)
        order = dpp_map(view.tokens, k, relevance, view.part >= 0, self.split)
        return Reduction(order.sort(dim=1).values)

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
