"""VisionZip: keep the tokens that the class token attends to, and merge the others into a few contextual ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.aliases import Alias
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_keep, check_range, keep_count
from ..core.site import SEPARATORS, Counts, Layout, Site
from ..core.tower_scores import ScoredByTower
from ..core.view import TokenView
from ..errors import ParameterError, SiteError

KEYS, TURNED = "keys@vision:feature", "turned_keys@vision:feature"
"""Keys before rope, as the release has them, and after it, as ports to towers with rope compare them."""

Choice = tuple[Tensor, Tensor, Tensor, Tensor]
"""dominant `[B, D]`, targets `[B, T]`, joining `[B, R]`, and the target (0 to T - 1) that each joins `[B, R]`."""


def dominant_and_contextual(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> Choice:
    """Splits patches into dominant ones, merge targets and the rest, and gives the rest to the targets.

    Dominant patches have the highest scores. Of the others, in their order, every (R // contextual)-th is a target;
    each other one joins the target with the most similar key (arXiv 2412.04467).

    Args:
        score: `[B, N]`, attention that a patch gets, any floating dtype.
        keys: `[B, N, d]`, keys of the same layer.
        dominant: patches to keep as they are.
        contextual: targets; dominant + contextual is at most N.

    Returns:
        Four int64 tensors, each ascending but the last.
    """
    batch, n = score.shape
    kept = keep_top(score, dominant)
    taken = torch.zeros(batch, n, dtype=torch.int64, device=score.device).scatter(1, kept, 1)
    rest = taken.argsort(dim=1, stable=True)[:, : n - dominant]
    if not contextual:
        none = rest[:, :0]
        return kept, none, none, none
    stride = rest.shape[1] // contextual
    spans = rest[:, : stride * contextual].unflatten(1, (contextual, stride))
    targets = spans[:, :, 0]
    joining = torch.cat([spans[:, :, 1:].flatten(1), rest[:, stride * contextual :]], 1)
    _, target = kernels.match_max(kernels.take_rows(keys, joining), kernels.take_rows(keys, targets))
    return kept, targets, joining, target


def _shown_with(view: TokenView) -> Tensor:
    """Tokens of the crop, picture or frame of each token, `[B, N]`: what makes sums of means over their rows."""
    alike = (view.part[:, :, None] == view.part[:, None]) & (view.picture[:, :, None] == view.picture[:, None])
    return alike.sum(-1)


def _together(value: Any, settings: Mapping[str, Any]) -> int:
    """All tokens of a crop, from the paper's two counts."""
    contextual = settings.get("contextual")
    counts = [one for one in (value, contextual) if isinstance(one, int) and not isinstance(one, bool)]
    if len(counts) < 2 or min(counts) < 0:
        raise ParameterError(
            f"VisionZip: dominant={value!r} is a count and needs contextual as a count beside it, for instance "
            "dominant=54:contextual=10; or give both together as keep"
        )
    return sum(counts)


@register_method
@dataclass(eq=False)
class VisionZip(ScoredByTower):
    """Shortens each crop to dominant tokens and contextual ones, before the projector; the text plays no part.

    Dominant tokens are the class token, which then goes on to the language model, and the patches it attends to most,
    in the layer whose output the projector reads. A contextual token is the sum of a target patch and the mean of the
    patches that join it.

    Where nothing can leave before the projector (crops that the host reassembles, patches that it joins), both are
    chosen at the language model's input, one thumbnail, crop or frame at a time, as ports to such models do: scores and
    keys (as attention compares them, after rope) follow the host's way from patches to tokens, no class token goes on,
    and a contextual token is the same sum of projected tokens, at its target's place.

    Algorithm:
        1. ``s_i = sum_h`` of class-token attention on patch i, in the layer whose output the projector reads.
        2. Dominant: the class token and the patches of highest s_i.
        3. Of the R others, in their order, every ``(R // contextual)``-th is a target.
        4. Each remaining patch joins the target t of highest ``cos(k_j, k_t)``.
        5. ``y_t = x_t + mean of the x_j that join t``.

    Args:
        keep: share (float) or count (int) of a crop's tokens: dominant (class token included) and contextual ones
            together.
        contextual: of these, a share or a count that are contextual; 0 merges nothing. 5/32 gives the paper's 10 of
            64, 20 of 128 and 30 of 192. The paper's `dominant` is the rest.
        separators: what becomes of a host's newlines between rows of patches (LLaVA-NeXT, OneVision): ``"drop"``, so
            that `keep` counts all tokens, as released, or ``"keep"``.
        scope: ``"part"`` chooses from each crop, picture or frame by itself; ``"sample"`` from all tokens of a prompt
            together, by the sums of attention that they receive, as ports released for Qwen2.5-VL do (with
            ``contextual = .05 / keep``). Behind the projector only.
    """

    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025)"
    arxiv = "2412.04467"
    code = "https://github.com/dvlab-research/VisionZip"
    parity = "index-exact with the released selection, merged tokens 1e-5 (visionzip_*)"
    deviations = (
        "A tower without a class token is scored by the attention that each token receives; the release knows CLIP.",
        "Similarity is computed in fp32; equal scores go to the lowest index.",
        "Few patches left over merge into fewer targets or none; the release fails.",
        "Where it acts behind the projector, tokens keep the picture's order and no class token goes on; the release "
        "merges LLaVA-NeXT's crops before it and moves their class and contextual tokens behind the picture.",
        "Each picture, crop or frame has tokens of its own; released ports to Qwen2.5-VL rank all pictures of a call "
        "together, as scope='sample' does.",
    )
    aliases = (Alias("dominant", "keep", formula="dominant + contextual", convert=_together),)
    beside = ("turned_keys",)
    budget_parameter = "keep"

    keep: float | int = 0.111
    contextual: float | int = 0.15625
    separators: str = "drop"
    scope: str = "part"  # type: ignore[misc]  # what the core reads of every method, here a setting

    def __post_init__(self) -> None:
        check_keep(self.keep, "VisionZip")
        check_choice(self.separators, "VisionZip", "separators", SEPARATORS)
        check_choice(self.scope, "VisionZip", "scope", ("part", "sample"))
        if isinstance(self.contextual, int):
            check_range(self.contextual, "VisionZip", "contextual", 0, kind=int)
        else:
            check_keep(self.contextual, "VisionZip", "contextual")
        if isinstance(self.keep, int) and isinstance(self.contextual, int) and self.contextual >= self.keep:
            raise ParameterError(
                f"VisionZip: contextual={self.contextual} of keep={self.keep} leaves no dominant token; "
                f"at most {self.keep - 1}"
            )

    def sites(self, layout: Layout) -> list[Site]:
        """What the projector gets, or what it made where that reaches the language model with its attention."""
        score, stage = self.place(layout)
        if stage == "projected":
            return [Site(stage, needs=(f"{score}@vision:feature", TURNED), separators=self.separators)]
        if self.scope == "sample":
            raise SiteError(
                f"VisionZip acts at {stage!r} of {layout.family}, where each crop is chosen from by itself; "
                "scope='sample' is for models whose tokens it chooses behind the projector; here: scope='part'"
            )
        protected = ("protected",) if score == "cls_attention" else ()
        return [Site(stage, needs=(f"{score}@vision:feature", KEYS, *protected))]

    def remarks(self, layout: Layout) -> list[str]:
        """Which stage it took where that is not the papers'."""
        said = super().remarks(layout)
        return [*said, "VisionZip chooses from all pictures of a prompt together"] if self.scope == "sample" else said

    def reduce(self, view: TokenView) -> Reduction | None:
        """Slots: the class token, dominant patches, contextual tokens; behind the projector in the picture's order."""
        batch, n, _ = view.tokens.shape
        k = self.count(view.counts)
        if k == n:
            return None
        contextual = self._contextual(k)
        late = view.site.stage == "projected"
        classed = view.has("cls_attention@vision:feature")
        if classed:
            score = view.signal("cls_attention@vision:feature").float().sum(1)
        else:
            score = view.signal("received_attention@vision:feature")
            if self.scope == "sample":
                score = score * _shown_with(view)
        classed = classed and not late  # only before the projector there is a class token that can go on
        kept, targets, joining, target = dominant_and_contextual(
            score, view.signal(TURNED if late else KEYS), k - contextual - classed, contextual
        )
        head = kept.new_full((batch, int(classed)), n)  # the first protected token
        keep = torch.cat([head, kept, targets], 1)
        order = keep.argsort(dim=1) if late else None
        if not contextual:
            return Reduction(keep if order is None else keep.gather(1, order))
        one = torch.ones_like(joining, dtype=torch.float32)
        members = one.new_zeros(batch, contextual).scatter_add(1, target, one)
        weight = 1.0 / members.gather(1, target)
        slot = target + (k - contextual)
        if order is not None:
            keep, slot = keep.gather(1, order), order.argsort(dim=1).gather(1, slot)
        return Reduction(keep, joining, slot, torch.ones_like(keep, dtype=torch.float32), weight)

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)

    def _contextual(self, k: int) -> int:
        wanted = self.contextual if self.contextual == 0 else keep_count(self.contextual, k)
        return min(int(wanted), k - 1)
