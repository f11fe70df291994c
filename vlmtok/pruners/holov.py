"""HoloV: a quota for each run of the picture by its mean attention, and inside it the most attended tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import chosen_first, ranked
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import SEPARATORS, Counts, Layout, Site
from ..core.tower_scores import tower_attention
from ..core.view import TokenView
from ..errors import SiteError

SCALE = 1000.0
"""Factor of the attention in a run's score; a run of one token has none."""


def run_sizes(n: int, runs: int) -> list[int]:
    """Tokens of each run of n tokens in a row; the first ones have one more where it does not divide evenly."""
    return [size for size in (n // runs + (i < n % runs) for i in range(runs)) if size]


def run_scores(tokens: Tensor, attention: Tensor, sizes: list[int], alpha: float) -> Tensor:
    """Mean attention of each run, a little more where its tokens differ (arXiv 2510.02912).

    Args:
        tokens: `[B, N, D]`, projected tokens, any floating dtype.
        attention: fp32 `[B, N]`.
        sizes: tokens of each run; they sum to N.
        alpha: weight of the differences.

    Returns:
        fp32 `[B, runs]`.
    """
    found = []
    with kernels.exact(tokens.device):
        for x, a in zip(tokens.split(sizes, 1), attention.split(sizes, 1)):
            n = x.shape[1]
            if n == 1:
                found.append(a[:, 0])
                continue
            wide = x.float()
            unit = wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + 1e-6)
            alike = unit @ unit.transpose(1, 2)
            alike = alike - torch.diag_embed(alike.diagonal(dim1=1, dim2=2))
            mean = alike.sum(-1, keepdim=True) / (n - 1)
            spread = (alike - mean).square().sum(-1) / (n - 1)
            scaled = SCALE * a
            factor = scaled.abs().mean(1, keepdim=True) / (spread.abs().mean(1, keepdim=True) + 1e-6)
            found.append((scaled + alpha * spread * factor).mean(1))
    return torch.stack(found, 1)


def quotas_of(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many of k tokens each run gets: in proportion to its score, the rest one each to those of greatest score.

    Args:
        score: fp32 `[B, runs]`.
        k: tokens in all.

    Returns:
        int64 `[B, runs]`, which may be more than a run has, and the runs' weights, fp32 `[B, runs]`.
    """
    weight = score / (score.sum(1, keepdim=True) + 1e-6)
    quota = (weight * k).floor().long()
    rank = ranked(weight).argsort(dim=1)
    return quota + (rank < (k - quota.sum(1, keepdim=True))).long(), weight


def handed_on(quota: Tensor, weight: Tensor, sizes: list[int], k: int) -> Tensor:
    """Quotas in which what a run has no tokens for goes to the runs of greatest weight that have room.

    Args:
        quota: int64 `[B, runs]`.
        weight: fp32 `[B, runs]`.
        sizes: tokens of each run.
        k: tokens in all, at most as many as there are.

    Returns:
        int64 `[B, runs]`, at most `sizes`; k in each row.
    """
    size = torch.tensor(sizes, device=quota.device)
    taken = torch.minimum(quota, size)
    order = ranked(weight)
    room = (size - taken).gather(1, order)
    before = room.cumsum(1) - room
    more = torch.minimum((k - taken.sum(1, keepdim=True) - before).clamp(min=0), room)
    return taken + torch.zeros_like(taken).scatter(1, order, more)


def most_attended(attention: Tensor, sizes: list[int], quota: Tensor) -> Tensor:
    """The most attended tokens of each run.

    Args:
        attention: `[B, N]`.
        sizes: tokens of each run.
        quota: int64 `[B, runs]`, at most `sizes`.

    Returns:
        bool `[B, N]`.
    """
    chosen = []
    for part, count in zip(attention.split(sizes, 1), quota.split(1, 1)):
        chosen.append(ranked(part).argsort(dim=1) < count)
    return torch.cat(chosen, 1)


@register_method
@dataclass(eq=False)
class HoloV(Method):
    """Keeps the most attended tokens of each run of a picture, of every run as many as its mean attention says.

    It acts behind the projector, on a whole picture with all its crops. The variance of similarities that the paper
    speaks of does next to nothing in the released formula: it cancels, see `caveats`.

    Algorithm:
        1. The N tokens in their order are cut into runs of equal length.
        2. ``t_i = 1000 a_i + alpha v_i mean|1000 a| / mean v``, v the variance of a token's cosines with its run;
           the run's score c is the mean of t.
        3. Quotas: ``floor(k c_p / sum c)``, the rest one each to the runs of greatest score.
        4. What a run has no tokens for goes to the runs of greatest score that have room.
        5. Of each run the tokens of highest a stay, in the order of the picture.

    Args:
        keep: share (float) or count (int) of a picture's tokens that stay.
        runs: pieces that the picture's tokens are cut into, in their order: not rectangles.
        alpha: weight of the variance.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"``, so
            that `keep` counts all tokens, as released, or ``"keep"``.
    """

    paper = "Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention (NeurIPS 2025)"
    arxiv = "2510.02912"
    code = "https://github.com/obananas/HoloV"
    parity = "quotas and sets exact with the released selection where it fills its budget (holov_*)"
    deviations = (
        "What a run has no tokens for goes to other runs; the release appends rows of zeros (42 of 432 tokens for "
        "smooth attention).",
        "Tokens stay in the order of the picture; the release orders each run by attention, which moves positions.",
        "A tower without a class token is scored by received attention, in raster order; the release's Qwen2.5-VL "
        "leaves scores in the order of windows and slices one token too early.",
        "Each picture has its own budget; the release takes one picture a call.",
        "Features of any dtype are compared in fp32.",
    )
    caveats = (
        "The variance cancels: a run's score is its mean attention times 1 + alpha, whatever its tokens are, so quotas "
        "are those of alpha = 0 (of 200 random pictures none changes between 0, 0.09 and 100).",
        "With a quarter of scenes-llava's tokens 69 % of 300 questions are right, 75 % by the same attention without "
        "quotas (`fastervlm`).",
    )
    aliases = (Alias("prune_rate", "keep", "the released code"), Alias("num_patches", "runs", "the released code"))
    budget_parameter = "keep"

    keep: float | int = 0.111
    runs: int = 16
    alpha: float = 0.09
    separators: str = "drop"

    def __post_init__(self) -> None:
        check_keep(self.keep, "HoloV")
        check_range(self.runs, "HoloV", "runs", 1, kind=int)
        check_range(self.alpha, "HoloV", "alpha", 0)
        check_choice(self.separators, "HoloV", "separators", SEPARATORS)

    def sites(self, layout: Layout) -> list[Site]:
        """Behind the projector, with the attention of the layer that it reads."""
        layout.stage("projected", "HoloV")
        name = self._score(layout)
        return [Site("projected", needs=(f"{name}@vision:feature",), scope="clip", separators=self.separators)]

    @staticmethod
    def _score(layout: Layout) -> str:
        for name in ("cls_attention", "received_attention"):
            if layout.gives("vision", name, later=True):
                return name
        tower = layout.stages.get("vision")
        why = f": {tower.why}" if tower is not None and tower.why else ""
        raise SiteError(f"HoloV decides on the tower's attention, which {layout.family} does not hand on{why}")

    def reduce(self, view: TokenView) -> Reduction | None:
        """Quotas of the runs, then the most attended tokens of each."""
        k, n = self.count(view.counts), view.counts.n
        if k == n:
            return None
        attention = tower_attention(view)
        bad = attention.isnan() | view.tokens.isnan().any(-1)
        tokens = torch.where(bad.unsqueeze(-1), 0.0, view.tokens)
        sizes = run_sizes(n, self.runs)
        score = run_scores(tokens, torch.where(bad, 0.0, attention.float()), sizes, self.alpha)
        quota = handed_on(*quotas_of(score, k), sizes, k)
        chosen = most_attended(torch.where(bad, float("-inf"), attention.float()), sizes, quota)
        return Reduction(chosen_first(chosen)[0][:, :k])

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
