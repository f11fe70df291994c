"""MMTok: keep visual tokens that cover the words of the text and the picture itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import POSITIONS, SEPARATORS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import MissingSignal
from ..kernels.reference.rows import blank, finite_unit_rows, products, square_products
from ..kernels.reference.steps import in_steps

VISION = ("tower", "projected")
_FEATURES = "outputs@vision:feature"
_COLDEST = 1e-4  # below, fp32 logits leave no difference but that of the best


def multimodal_coverage(
    x: Tensor,
    features: Tensor,
    k: int,
    text: Tensor | None = None,
    *,
    alpha: float = 0.5,
    tau_t: float = 0.02,
    tau_v: float = 0.2,
    padding: Tensor | None = None,
) -> Tensor:
    """Greedy choice of k tokens that cover a text and the picture (arXiv 2508.18264).

    Words and tokens look at tokens by softmax over cosines; what a chosen token covers of each is what it is looked at.

    Args:
        x: `[B, N, D]`, visual tokens in the space of the text, any floating dtype.
        features: `[B, N, C]`, the same tokens as they cover each other.
        k: how many, at most N.
        text: `[B, M, D]` or `[M, D]`, embeddings of words; None or M = 0 leaves the picture alone.
        alpha: weight of the picture beside the text, which has 1; without a text it means nothing.
        tau_t: temperature of words, and
        tau_v: of tokens.
        padding: bool `[B, N]`, tokens that follow behind all others; None means none.

    Returns:
        int64 `[B, k]`, in the order chosen, without repeats. The lowest index wins a tie, NaN tokens come last.
    """
    with kernels.exact(x.device):
        (unit, finite, _), (own, finite_too, _) = finite_unit_rows(x), finite_unit_rows(features)
        bad = ~(finite & finite_too)
        unit, own = blank(unit, bad), blank(own, bad)
        words = None
        if text is not None and text.shape[-2]:
            words = kernels.unit_rows(text).expand(len(x), -1, -1)
        late = 2 * bad.long() if padding is None else torch.where(bad, 2, padding.long())
        chosen = []
        for part, _ in in_steps(len(x), 1, x.shape[1] ** 2, x.device.type):  # so that few tables are held
            table = _looks(square_products(own[part]), bad[part], tau_v, alpha if words is not None else 1.0)
            if words is not None:
                by_words = _looks(products(unit[part], words[part]), bad[part], tau_t)
                by_words.nan_to_num_(nan=0.0)  # a word that is not finite looks at none
                table = torch.cat([by_words, table], 2)
            chosen.append(kernels.greedy_cover(table, k, late=late[part])[0])
        return torch.cat(chosen)


def _looks(cosines: Tensor, bad: Tensor, tau: float, scale: float = 1.0) -> Tensor:
    """How much of the mean look of R rows each of N tokens gets, times `scale`, fp32 `[B, N, R]`; NaN tokens get none.

    Args:
        cosines: fp32 `[B, N, R]`, of tokens with rows; written to.
        bad: bool `[B, N]`, tokens with NaN.
        tau: temperature.
        scale: of all.
    """
    looks = blank(cosines.div_(tau), bad, float("-inf")).softmax(1)
    # Where no token is left to be looked at, softmax gives NaN.
    return blank(looks, bad).div_(cosines.shape[2]).mul_(scale)


def square_padding(width: int, height: int, *, size: int = 336, patch: int = 14) -> Tensor:
    """Patches that show nothing but the padding of a picture that was padded to a square (LLaVA-1.5).

    Args:
        width: of the picture, pixels.
        height: of the picture.
        size: side of the square that the tower gets.
        patch: side of a patch.

    Returns:
        bool `[(size / patch) ** 2]`, row by row: what the signal ``padding`` holds for such a picture.
    """
    side = size // patch
    shown = round(size * min(width, height) / max(width, height))
    before = (size - shown) // 2
    line = torch.arange(side)
    empty = (line < before // patch) | (line >= side - (size - shown - before) // patch)
    wide = empty if width > height else torch.zeros_like(empty)
    high = empty if height > width else torch.zeros_like(empty)
    return (wide[:, None] | high[None, :]).flatten()


@register_method
@dataclass(eq=False)
class MMTok(Method):
    """Keeps tokens of each crop that cover the text's words and the crop itself best, at the language model's input.

    Words are the input embeddings of the text behind the picture; give embeddings of your own, `[B, M, D]` or `[M, D]`,
    as the signal ``text``. A crop's tokens cover each other by the tower's features, as the projector got them: of the
    block that it reads, before a norm that some towers have behind their last block; where patches are joined, the mean
    over those of a token. Tokens of a signal ``padding``, bool `[B, N]` (`square_padding` makes it), are chosen last.

    Algorithm:
        1. ``P_ij = softmax_j(cos(t_i, v_j) / tau_t) / M`` for the M words t_i and the N projected tokens v_j.
        2. ``Q_ij = alpha softmax_j(cos(f_i, f_j) / tau_v) / N``, f the tower's features.
        3. G are the rows of both; ``cover_i = 0`` for each.
        4. Take the j of largest ``sum_i max(0, G_ij - cover_i)`` of those not yet chosen, then
           ``cover_i = max(cover_i, G_ij)``.
        5. Until k tokens are chosen; they stay in their order.

    Args:
        keep: share (float) or count (int) of a crop's tokens that stay.
        alpha: weight of the picture beside the text; 0 leaves the text alone. Without a text only the picture counts.
        tau_t: temperature of words: 0.02 as released for LLaVA, 0.01 for Qwen2.5-VL.
        tau_v: temperature of tokens.
        vision: ``"tower"`` features, or ``"projected"`` tokens in their place, for models that do not give the former.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"``, so
            that `keep` counts all tokens, as released, or ``"keep"``.
        positions: ``"renumber"`` or ``"keep"`` the position ids; None is the model's default.
    """

    paper = "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs (ICLR 2026)"
    arxiv = "2508.18264"
    code = "https://github.com/Ironieser/MMTok"
    parity = "order-exact with the released selection (mmtok_*)"
    deviations = (
        "The text is all that stands behind the picture, the prompt's template included; the release takes the "
        "question, for LLaVA without its most frequent words.",
        "Tokens of padding come as a signal of yours; the release finds them for LLaVA-1.5. Where too few others are "
        "left, they follow, each once; the release repeats index 0.",
        "Each picture has its own budget; the release gives all pictures of a Qwen2.5-VL prompt one.",
        "Cosines are fp32; the release normalises in the model's dtype. A NaN token leaves the others alone.",
    )
    scope = "part"
    aliases = (Alias("k", "keep"),)
    caveats = (
        "With a tenth of scenes-llava's tokens print and charts are read as with all, and none of 25 questions that "
        "count to nine is right (all: 23); 81 % of 300 questions in all, DivPrune 96 %.",
    )
    budget_parameter = "keep"

    keep: float | int = 0.111
    alpha: float = 0.5
    tau_t: float = 0.02
    tau_v: float = 0.2
    vision: str = "tower"
    separators: str = "drop"
    positions: str | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep, "MMTok")
        check_range(self.alpha, "MMTok", "alpha", 0)
        check_range(self.tau_t, "MMTok", "tau_t", _COLDEST)
        check_range(self.tau_v, "MMTok", "tau_v", _COLDEST)
        check_choice(self.vision, "MMTok", "vision", VISION)
        check_choice(self.separators, "MMTok", "separators", SEPARATORS)
        check_choice(self.positions, "MMTok", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input, with the text and, unless told otherwise, the tower's features."""
        layout.stage("projected", "MMTok")
        needs: tuple[str, ...] = ("text",)
        if self.vision == "tower":
            if not layout.gives("vision", "outputs", later=True):
                why = layout.without.get("vision", "nothing of its tower reaches the language model's input")
                raise MissingSignal(
                    f"MMTok needs the tower's features at 'projected', which {layout.family} does not give ({why}); "
                    "vision='projected' takes projected tokens in their place"
                )
            needs += (_FEATURES,)
        return [Site("projected", needs=needs, positions=self.positions, separators=self.separators)]

    def remarks(self, layout: Layout) -> list[str]:
        """That tokens cover each other by what the paper does not take, where so asked."""
        if self.vision == "tower":
            return []
        return ["MMTok compares projected tokens with each other, where the paper takes the tower's features"]

    def reduce(self, view: TokenView) -> Reduction | None:
        """Greedy choice; slots in the order of the tokens."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        features = view.tokens if self.vision == "projected" else view.signal(_FEATURES)
        order = multimodal_coverage(
            view.tokens,
            features,
            k,
            view.maybe("text"),
            alpha=self.alpha,
            tau_t=self.tau_t,
            tau_v=self.tau_v,
            padding=view.maybe("padding"),
        )
        return Reduction(order.sort(dim=1).values)

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)
