"""CrossGET: merge the tokens that a complete similarity graph calls redundant and a cross token calls unimportant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import POOLINGS, check_choice, check_flag, check_range
from ..core.site import Counts, Layout, Site
from ..core.view import TokenView
from ..errors import MissingSignal, ParameterError

GUIDANCE = ("auto", "cls", "cross", "attention", None)


def ensemble(keep: Tensor, src: Tensor, dst: Tensor, importance: Tensor, size: Tensor | None = None) -> Reduction:
    """Cross-guided ensemble (arXiv 2305.17455, section 3.2), weighted by `vlmtok.kernels.pair_weights`.

    Args:
        keep: int64 `[B, K]`, tokens that stay.
        src: int64 `[B, r]`.
        dst: int64 `[B, r]`, the slot that each joins (as from `vlmtok.kernels.complete_match`).
        importance: fp32 `[B, N]`.
        size: fp32 `[B, N]`, or None for ones.

    Returns:
        The reduction.
    """
    return Reduction.paired(keep, src, dst, importance, size)


def attention_importance(received: Tensor, guide: Tensor, protected: int) -> Tensor:
    """Importance in LLaVA: the mean attention that a token gets from other rows, plus what it gets from the guide.

    Args:
        received: fp32 `[B, N]`, mean over heads and all ``protected + N`` rows.
        guide: `[B, H, N]`, attention of the cross token's row.
        protected: rows that are not among the N tokens, the cross token's included.

    Returns:
        fp32 `[B, N]`; about 2 / N: against similarities it hardly matters.
    """
    rows = protected + received.shape[1]
    asked = guide.float().mean(1)
    return (received.float() * rows - asked) / (rows - 1) + asked


# ---------------------------------------------------------------------- training
class CrossTokens(nn.Module):
    """The learnable cross tokens, one a layer and tower; zeros are the untrained ones.

    Names and shapes are those of the released checkpoints, `[1, layers, width]`.
    """

    cross_image: nn.Parameter | None
    cross_text: nn.Parameter | None

    def __init__(self, image: tuple[int, int] | None = None, text: tuple[int, int] | None = None) -> None:
        """Makes the towers' tokens from (layers, width), or none."""
        super().__init__()
        for name, shape in (("cross_image", image), ("cross_text", text)):
            self.register_parameter(
                name, None if shape is None else nn.Parameter(torch.zeros(1, *shape, dtype=torch.float32))
            )


def cross_tokens(row: Mapping[str, Any]) -> Tensor:
    """The cross tokens of one forward, each with its layer's parameter added, for `cross_loss`.

    Args:
        row: the method's row dict of that forward of a tower.

    Returns:
        `[layers * B, C]`, layer by layer; gradients flow to the parameters.

    Raises:
        ParameterError: no cross token was inserted.
    """
    layers = sorted(int(name.removeprefix("cross.")) for name in row if name.startswith("cross."))
    if not layers:
        raise ParameterError("this forward inserted no cross token; use CrossGET with guidance='cross'")
    return torch.cat([row[f"cross.{layer}"].squeeze(1) for layer in layers])


def cross_loss(image: Tensor, text: Tensor, kind: str = "released") -> Tensor:
    """How far the cross tokens of two towers are from predicting each other.

    With P and Q the softmaxes of both and M their mean, it is the mean over rows of ``(KL(M || P) + KL(M || Q)) / 2``
    as released, or the Jensen-Shannon divergence ``(KL(P || M) + KL(Q || M)) / 2`` that the paper names.

    Args:
        image: `[M, E]`, `cross_tokens` of the vision tower through its final norm (released: that before the blocks)
            and projection, both detached.
        text: `[M, E]`, the same of the text tower; both towers need equally many layers.
        kind: ``"released"`` or ``"js"``.

    Returns:
        A scalar, fp32.

    Raises:
        ParameterError: the shapes differ.
    """
    check_choice(kind, "cross_loss", "kind", ("released", "js"))
    if image.shape != text.shape:
        raise ParameterError(
            f"cross_loss needs as many cross tokens of both towers, got {list(image.shape)} and {list(text.shape)}"
        )
    p, q = image.float().log_softmax(-1), text.float().log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2.0)
    pairs = [(m, p), (m, q)] if kind == "released" else [(p, m), (q, m)]
    return sum(((a.exp() * (a - b)).sum(-1).mean() for a, b in pairs), start=p.new_zeros(())) / 2.0


# ---------------------------------------------------------------------- the method
_PRESETS: dict[str, dict[str, Any]] = {
    "free": {},
    "clip": {"guidance": "cross", "rl": 0},
    "llava": {"guidance": "attention", "rv": 13},
}


@register_method
@dataclass(eq=False)
class CrossGET(Method):
    """Merges a fixed number of tokens in every layer of the vision tower, the text tower, or both.

    Who says what is important is `guidance`. ``"cls"`` asks the class token (EOT in text), needs no training and is
    what ``"auto"``, the default, takes; in a tower without a class token that is None. ``"cross"`` inserts a learnable
    cross token and asks that one; the published accuracy is that of trained cross tokens (`run.parameters()`,
    `cross_tokens`, `cross_loss`), mostly with the whole model fine-tuned. Untrained ones equal the class token, which
    attention then sees twice. ``"attention"`` is the form for LLaVA: attention received, keys averaged over heads, and
    the cross token goes on to the language model. None is complete-graph matching (`vlmtok.kernels.complete_match`)
    alone.

    Nothing of the other modality is read: a trained cross token predicts it.

    Algorithm:
        1. ``s_ij = cos(k_i, k_j)`` of all pairs of keys; tokens are ranked by falling ``max_{j != i} s_ij``.
        2. ``b_i = max s_ij`` over the tokens j that rank behind i: how redundant i is once the graph has no circles.
        3. Importance ``g_i``: cosine of k_i with the guide's query (CLS, EOT, cross token), or attention; none: 0.
        4. The r tokens of lowest ``g_i - b_i`` merge, each with ``argmax_j s_ij`` among those that stay.
        5. Source s and target d weigh ``(w_s, w_d) = 2 softmax(g_s, g_d)``; with sizes m the target becomes
        6. ``x_d = (m_d x_d + sum_s [w_s m_s x_s + (w_d - 1) m_d x_d]) / (m_d + sum_s m_s)``.
        7. Guidance ``"cross"`` and ``"attention"`` add a cross token to each block: CLS (later its own output; in text
           EOT) plus a learned vector of that layer.

    Args:
        rv: tokens merged in a layer of the vision tower, capped at half; 0 merges nothing, None leaves the tower alone.
        rl: the same for the text tower; its first token and EOT stay. A slot may hold a later token's content, which
            makes causality approximate.
        guidance: ``"auto"``, ``"cls"``, ``"cross"``, ``"attention"`` or None.
        prop_attn: add log(size) to the attention logits.
        pooling: what a merged token counts in a head that pools tokens: ``"size"`` weights means by size; ``"plain"``
            counts it once; ``"attention"`` also adds log(size) to an attention pool's logits.
    """

    paper = "CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language Transformers (ICML 2024)"
    arxiv = "2305.17455"
    code = "https://github.com/sdc17/CrossGET"
    parity = "index-exact with the released matching under a stable sort; tiny CLIP end to end 1e-4 (crossget_*)"
    caveats = (
        "With guidance='cls' and no training it loses to Random on tiny-llava at 72 tokens a layer (82.8 % against "
        "93.0 %): the class token there is no guide to what a question will ask for, and it weights the merges; "
        "guidance=None answers 97.7 % of 300 questions. The published accuracy is that of trained models.",
    )
    deviations = (
        "Mutual best pairs tie exactly and the release's sort decides at random; ties go to the lowest index.",
        "Keys are read after a key norm, where a model has one.",
        "guidance='cls' inserts nothing and needs no training; the release has only learned cross tokens, and the "
        "published accuracy is that of fine-tuned models.",
        "A zero key has similarity 0; the release divides by zero.",
        "EOT is tracked by its place; the release averages token ids and looks for the greatest.",
        "All protected tokens stay; the release protects the first and the last.",
        "In LLaVA the language model's first position takes no text cross token.",
        "The BLIP and BLIP-2 forms exist in the paper only and are left out.",
    )

    aliases = (Alias("r", instead="rv is that of the vision tower, rl that of the text tower"),)
    budget_parameter = "rv"

    rv: int | None = 16
    rl: int | None = None
    guidance: str | None = "auto"
    prop_attn: bool = True
    pooling: str = "size"

    def __post_init__(self) -> None:
        for name in ("rv", "rl"):
            if getattr(self, name) is not None:
                check_range(getattr(self, name), "CrossGET", name, 0, kind=int)
        check_choice(self.guidance, "CrossGET", "guidance", GUIDANCE)
        check_flag(self.prop_attn, "CrossGET", "prop_attn")
        check_choice(self.pooling, "CrossGET", "pooling", POOLINGS)
        if self.rv is None and self.rl is None:
            raise ParameterError("CrossGET: rv=None and rl=None leave nothing to do")
        if self.guidance == "attention" and (self.rv is None or self.rl is not None):
            raise ParameterError("CrossGET: guidance='attention' is for vision towers alone; set rv, and leave rl None")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> CrossGET:
        """One of the forms.

        Args:
            name: ``"free"`` (no training), ``"clip"`` (cross tokens in both towers; rl=6 also merges text) or
                ``"llava"`` (13 a layer).
            overrides: parameters that differ.

        Returns:
            The method.

        Raises:
            ParameterError: no such preset or parameter.
        """
        check_choice(name, "CrossGET", "preset", tuple(_PRESETS))
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        """As `prop_attn`."""
        return self.prop_attn

    @property
    def inserts(self) -> bool:
        """Whether a cross token is inserted."""
        return self.guidance in ("cross", "attention")

    def sites(self, layout: Layout) -> list[Site]:
        """Every layer: its start where a cross token goes in, between attention and MLP where tokens merge."""
        needs = {
            "cls": ("keys_full", "protected_queries"),
            "cross": ("keys_full", "protected_queries"),
            "attention": ("keys", "received_attention", "protected_attention"),
            None: ("keys_full",),
        }
        sites = []
        for stage, r in (("vision", self.rv), ("text", self.rl)):
            if r is None:
                continue
            layout.stage(stage, "CrossGET")
            classed = layout.gives(stage, "cls_attention") or layout.stages[stage].why  # then the signals say so
            guidance = self._guidance(layout, stage)
            if stage == "vision" and guidance is not None and not classed:
                raise MissingSignal(
                    f"CrossGET with guidance={self.guidance!r} needs a class token, and the tower of {layout.family} "
                    "has none; guidance=None works there"
                )
            for layer in layout.layers(stage):
                if self.inserts:
                    # Text takes the cross token from EOT anew in every layer, vision from the layer before.
                    carried = ("protected", "inserted") if stage == "vision" else ("protected",)
                    sites.append(Site(stage, layer, "start", carried))
                if r:
                    sites.append(Site(stage, layer, "mid", needs[guidance]))
        if self.guidance == "attention" and layout.has("features"):
            sites.append(Site("features", needs=("protected",)))
        return sites

    def remarks(self, layout: Layout) -> list[str]:
        """That nobody guides it where it chose so by itself."""
        if self.rv is None or self.guidance != "auto" or self._guidance(layout, "vision") is not None:
            return []
        return [f"CrossGET merges without guidance (guidance=None): the tower of {layout.family} has no class token"]

    def _guidance(self, layout: Layout, stage: str) -> str | None:
        """Who says what is important in a tower."""
        if self.guidance != "auto":
            return self.guidance
        classed = layout.gives(stage, "cls_attention") or layout.stages[stage].why
        return "cls" if classed else None

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """Moves `rv`."""
        if self.rv is None:
            raise ParameterError("CrossGET: a budget moves rv, and rv=None leaves the vision tower alone")
        return replace(self, rv=round((1.0 - level) * (tokens // 2)))

    def reduce(self, view: TokenView) -> Reduction | None:
        """Matches and merges; at ``features`` appends the cross token."""
        batch, n, _ = view.tokens.shape
        if view.site.stage == "features":
            last = n + view.signal("protected").shape[1] - 1
            everything = torch.arange(n + 1, device=view.tokens.device)
            return Reduction(torch.where(everything < n, everything, last).expand(batch, n + 1))
        r = n - self.count(view.counts)
        if r <= 0:
            return None
        alone = self.guidance == "auto" and not view.has("protected_queries")
        if alone or self.guidance is None:  # equal importance is the size-weighted mean
            return Reduction(*kernels.complete_match(view.signal("keys_full"), None, r))
        if self.guidance == "attention":
            rows = view.signal("protected_attention")
            importance = attention_importance(view.signal("received_attention"), rows[:, -1], rows.shape[1])
            keep, src, dst = kernels.complete_match(view.signal("keys"), importance, r)
        else:
            # In text the query is EOT's even where a cross token stands behind it, as released.
            guide = -1 if self.guidance == "cross" and view.site.stage == "vision" else 0
            query = view.signal("protected_queries")[:, guide]
            keep, src, dst, importance = kernels.guided_match(view.signal("keys_full"), query, r)
        return ensemble(keep, src, dst, importance, view.size)

    def count(self, counts: Counts) -> int:
        """Tokens that arrive, less the merged ones; one more at ``features``."""
        if counts.site.stage == "features":
            return counts.n + 1
        r = self.rl if counts.site.stage == "text" else self.rv
        if counts.site.point != "mid" or r is None:
            return counts.n
        return counts.n - min(r, counts.n // 2)

    def insert(self, view: TokenView) -> Tensor | None:
        """The cross token `[B, 1, C]`: what it was (at first CLS; in text EOT), detached, plus the parameter."""
        if not self.inserts:
            return None
        assert isinstance(view.memory, CrossTokens)
        text = view.site.stage == "text"
        before = None if text else view.maybe("inserted")
        token = view.signal("protected")[:, :1] if before is None else before[:, :1]
        learned = view.memory.cross_text if text else view.memory.cross_image
        assert learned is not None
        token = token.detach() + learned[:, view.layer : view.layer + 1].to(token)
        view.row[f"cross.{view.layer}"] = token
        return token

    def build(self, layout: Layout) -> nn.Module | None:
        """The cross tokens, zeros."""
        if not self.inserts:
            return None
        shapes: list[tuple[int, int] | None] = []
        for stage, r in (("vision", self.rv), ("text", self.rl)):
            tower = None if r is None else layout.stage(stage, "CrossGET")
            shapes.append(None if tower is None else (tower.depth, tower.width))
        return CrossTokens(*shapes)
