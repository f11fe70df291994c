"""DART: a few pivots of large keys each keep the visual tokens that resemble them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias, share_that_goes
from ..core.between_layers import DropsBetweenLayers
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import ranked
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError

PLACES = ("decoder", "embeddings")
COUNTS = ("exact", "released")
_UNKNOWN, _BAD = 2.0, 3.0  # above every cosine: what a pivot with NaN says of others, and tokens with NaN themselves


def largest(norm: Tensor, count: int) -> Tensor:
    """The tokens of largest norm, by falling norm.

    Args:
        norm: `[B, N]`, any floating dtype.
        count: how many, at most N.

    Returns:
        int64 `[B, count]`; equal norms go to the lowest index, NaN comes last.
    """
    return ranked(norm)[:, :count]


def quotas(wanted: int, pivots: int) -> list[int]:
    """How many tokens each pivot takes, so that together they take so many: shares of what is left, rounded up.

    Args:
        wanted: tokens beside the visual pivots.
        pivots: how many there are, at least 1.

    Returns:
        One number for each pivot, none smaller than a later one, with the sum `wanted`.
    """
    found = []
    for left in range(pivots, 0, -1):
        found.append(-(-wanted // left))
        wanted -= found[-1]
    return found


def spread(x: Tensor, pivots: Tensor, quotas: Sequence[int], taken: Tensor) -> Tensor:
    """Tokens that resemble pivots least: each pivot in turn takes its number of them out of one pool.

    The pool shrinks, so that the order of the pivots decides.

    Args:
        x: `[B, N, C]`, states of the visual tokens, any floating dtype.
        pivots: `[B, P, C]`, states of the pivots, in the order in which they take.
        quotas: P numbers; a pivot that finds fewer tokens takes what is left.
        taken: int64 `[B, M]`, tokens that are in no pool: pivots among `x`.

    Returns:
        int64 `[B, K]`, in the order taken; of one pivot, the most dissimilar first. Equal cosines go to the lowest
        index, tokens with NaN come last.
    """
    n = x.shape[1]
    with kernels.exact(x.device):
        cosine = kernels.unit_rows(pivots) @ kernels.unit_rows(x).transpose(1, 2)
        cosine = torch.where(cosine.isnan(), _UNKNOWN, cosine)
        cosine = torch.where(x.isnan().any(-1)[:, None], _BAD, cosine)
    gone = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, taken, 1)
    room, found = n - taken.shape[1], [taken[:, :0]]
    for row, quota in zip(cosine.unbind(1), quotas, strict=True):
        count = min(quota, room)
        if not count:
            continue
        room -= count
        found.append(torch.where(gone, float("inf"), row).argsort(dim=1, stable=True)[:, :count])
        gone = gone.scatter(1, found[-1], 1)
    return torch.cat(found, 1)


@register_method
@dataclass(eq=False)
class DART(DropsBetweenLayers):
    """Keeps the visual tokens that resemble a few pivots least: those of large keys among picture and text.

    No attention is read. Inside the language model (``at="decoder"``) keys after rope and states behind the model's
    last norm decide, once, after the first K layers, as released. ``at="embeddings"`` decides on the input embeddings
    instead, in front of the language model, as TensorRT-Edge-LLM does, which sees no inner states. Each picture has a
    budget of its own; its text is what stands behind its first token.

    Algorithm:
        1. ``a_j``: L1 norm of token j's keys over heads and channels (embeddings: of its embedding).
        2. Pivots: the ``pivots[0]`` visual tokens of largest a, by falling a, then the ``pivots[1]`` of the text.
        3. ``s_j``: what layer K - 1 gave, through the last norm (embeddings: the embedding).
        4. Pivot by pivot: of the visual tokens that are left, the g_i of smallest ``cos(s_pivot, s_j)`` stay.
        5. ``g_i``: the tokens that still miss over the pivots that still follow, rounded up.
        6. Visual pivots and what they took stay, in their order. Pivots of the text only steer.

    Args:
        keep: share (float) or count (int) of a picture's tokens that stay. The paper's reduction ratio is the share
            that goes: keep = 1 - ratio.
        K: decoder layers that see every token (0-based: the cut is at the end of layer K - 1).
        pivots: how many of the picture, at least 1, and of the text; where the text is shorter, all of it.
        at: ``"decoder"`` or ``"embeddings"``.
        counts: ``"exact"`` keeps what `keep` says; ``"released"`` lets every pivot take ``floor(keep / pivots)``, so
            that the visual pivots come on top: 132 tokens for keep=128.
        positions: ``"keep"`` the position ids of what stays, as released, ``"renumber"`` them, or None for the default
            of the place.
    """

    paper = "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (EMNLP 2025)"
    arxiv = "2502.11494"
    code = "https://github.com/ZichenWen1/DART"
    parity = (
        "order-exact with the released selection, for the order of pivots that it walks and for ours; end to end 1e-4 "
        "on a Llama, greedy tokens equal; index-exact with TensorRT-Edge-LLM's test reference "
        "(dart_dec_*, dart_e2e_*, dart_emb_*, dart_x_*)"
    )
    deviations = (
        "Pivots take in the order of their norms, those of the picture first, as in TensorRT-Edge-LLM; the release "
        "walks a Python set of column numbers, which is no order of meaning, and often keeps other tokens.",
        "keep is exact unless counts='released'.",
        "All pictures of a prompt are pruned, each by itself; the release prunes the first and takes the others for "
        "text.",
        "Fewer tokens or words than pivots are no error: all of them are pivots.",
        "Scores are fp32; the release computes them in the model's dtype. Equal scores go to the lowest index.",
        "at='embeddings' looks at the text behind the picture; TensorRT-Edge-LLM at that in front, too (give it as the "
        "signal `text`), and counts ceil(n (1 - ratio)) with a ratio in single precision.",
    )
    aliases = (
        share_that_goes("reduction_ratio", "keep", "DART", "the released code"),
        Alias("max_num_trunction", "keep", "the released code"),
    )
    caveats = (
        "On embeddings it loses what it keeps inside: with a quarter of scenes-llava's tokens, averaged over layers, "
        "97 % of 300 questions are right in the decoder form, 93 % at the input, where tables fall to 20 of 25.",
    )
    budget_parameter = "keep"
    counted = "at=embeddings:positions=none"

    keep: float | int = 0.222
    K: int = 2
    pivots: tuple[int, int] = (4, 4)
    at: str = "decoder"
    counts: str = "exact"
    positions: str | None = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep, "DART")
        check_range(self.K, "DART", "K", 1, kind=int)
        if not isinstance(self.pivots, (tuple, list)) or len(self.pivots) != 2:
            raise ParameterError(f"DART: pivots={self.pivots!r} must be two numbers, of the picture and of the text")
        check_range(self.pivots[0], "DART", "pivots[0]", 1, kind=int)
        check_range(self.pivots[1], "DART", "pivots[1]", 0, kind=int)
        check_choice(self.at, "DART", "at", PLACES)
        check_choice(self.counts, "DART", "counts", COUNTS)
        check_choice(self.positions, "DART", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The end of layer K - 1, where layer K must exist, or the language model's input."""
        if self.at == "embeddings":
            layout.stage("projected", "DART")
            return [Site("projected", needs=("text",) if self.pivots[1] else (), positions=self.positions)]
        needs: tuple[str, ...] = ("key_norm", "normed")
        if self.pivots[1]:
            needs += ("text_key_norm", "text_normed")
        return [
            Site("decoder", layer - 1, "end", needs, positions=self.positions)
            for layer in layout.layers("decoder", self.K, "DART")
        ]

    def reduce(self, view: TokenView) -> Reduction | None:
        """Pivots, then what they take; slots in the order of the tokens."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        (norm, x), text = self._visual(view), self._text(view) if self.pivots[1] else None
        first = largest(norm, min(self.pivots[0], k))
        lanes = torch.arange(len(first), device=first.device)[:, None]
        steering = x[lanes, first]
        if text is not None:
            steering = torch.cat([steering, text[1][lanes, largest(text[0], self.pivots[1])]], 1)
        rest = spread(x, steering, quotas(k - first.shape[1], steering.shape[1]), first)
        return Reduction(torch.cat([first, rest], 1).sort(dim=1).values)

    def count(self, counts: Counts) -> int:
        """As `keep` says, or as many as the release would keep of a text with enough words."""
        if self.counts == "exact":
            return keep_count(self.keep, counts.n)
        share = self.keep * counts.n if isinstance(self.keep, float) else self.keep
        return min(counts.n, self.pivots[0] + sum(self.pivots) * int(share / sum(self.pivots)))

    def _visual(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """Norms `[B, N]` and states `[B, N, C]` of the view's tokens."""
        if self.at == "embeddings":
            return _l1(view.tokens), view.tokens
        return view.signal("key_norm"), view.signal("normed")

    def _text(self, view: TokenView) -> tuple[Tensor, Tensor] | None:
        """The same of the text; None where there is none."""
        if self.at == "embeddings":
            text = view.maybe("text")
            return None if text is None or not text.shape[1] else (_l1(text), text)
        norm = view.maybe("text_key_norm")
        return None if norm is None or not norm.shape[1] else (norm, view.signal("text_normed"))


def _l1(x: Tensor) -> Tensor:
    """L1 norms, fp32 `[B, N]`."""
    return x.abs().sum(-1, dtype=torch.float32)
