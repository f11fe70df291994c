"""PiToMe: protect informative tokens by an energy score, merge the rest in energy order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import POOLINGS, check_choice, check_flag, check_layers, check_range
from ..core.site import Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "aug": {"prop_attn": False},
    "deit": {"margin": (0.75, 0.75), "protect": "second_half", "prop_attn": False},
    "mae": {"margin": (0.75, 0.75), "protect": "first_half", "prop_attn": False},
    "clip": {"margin": (0.95, 0.95), "metric": "hidden", "prop_attn": False},
    "llava": {"metric": "hidden", "prop_attn": False, "point": "end", "plain": 13, "weighted": False},
    "blip": {"metric": "hidden", "prop_attn": False, "skip_last": 1},
    "blip2": {"margin": (0.75, 0.4)},
}


@register_method
@dataclass(eq=False)
class PiToMe(Method):
    """Merges a share of the tokens in every layer of a vision tower and spares those that stand alone.

    Energy tells how many similar tokens a token has; the 2r tokens of highest energy are matched, the rest is
    protected. The defaults are the paper's settings with the released energy.

    Algorithm:
        1. ``r = floor(T - T ratio)`` of T tokens merge, at most half.
        2. Energy by `metric` k: ``E_i = mean_j f(cos(k_i, k_j) - m)``, ``f(u) = u if u >= 0 else alpha (exp(u) - 1)``.
        3. The margin m falls with depth: ``m = a - b layer / depth``.
        4. By falling energy the first 2 r tokens are candidates, in turn A and B; those behind them are protected.
        5. Each of A joins ``argmax_b cos(k_a, k_b)``.
        6. A slot is the mean ``sum n_i x_i / sum n_i`` by sizes n; with `prop_attn` later logits get ``log n``.

    Args:
        ratio: share of the tokens that a layer keeps, for every layer, or a list with one a layer. At least half of
            the tokens stay. (The paper calls it r.)
        margin: cosine from which on two tokens count as alike: a number, or (a, b) for a - b * layer / depth.
        alpha: slope of the energy below the margin.
        energy: ``"elu"`` as released, ``"paper"`` as printed (eq. 4), ``"gaussian"`` as released for text.
        split: ``"alternate"`` ranks, or ``"halves"`` as released for text.
        protect: layers that protect tokens of low energy: ``"all"``, ``"none"``, ``"first_half"`` or
            ``"second_half"``; the others match every token in energy order.
        plain: this many first layers use ToMe's matching, their share counted with CLS.
        metric: what is compared: ``"keys"`` (mean over heads) or the ``"hidden"`` states at the site.
        weighted: merge by the size-weighted mean; False is the plain mean of the vectors.
        prop_attn: add log(size) to the attention logits.
        point: merge between attention and MLP (``"mid"``) or after the block (``"end"``).
        skip_last: this many last layers merge nothing.
        pooling: what a merged token counts in a head that pools tokens: ``"size"`` weights means by size, as the
            released MAE patch does; ``"plain"`` counts it once; ``"attention"`` also adds log(size) to an attention
            pool's logits.
    """

    paper = "Accelerating Transformers with Spectrum-Preserving Token Merging (NeurIPS 2024)"
    arxiv = "2405.16148"
    code = "https://github.com/hchautran/PiToMe"
    parity = (
        "index-exact with the released matching; end to end 1e-4 on a timm ViT and an HF CLIP tower "
        "(pitome_*, e2e_micro_vit*)"
    )
    deviations = (
        "A layer that would merge nothing leaves the order alone; the release reorders, or raises.",
        "A ratio below one half is capped at merging half; the release raises, or merges the class token.",
        "All protected tokens stay; the release merges a distillation token as if it were a patch.",
        "Energy and similarity are computed in fp32; equal energies go to the lowest index.",
        "Keys are read after a key norm, where a model has one.",
        "A mean weighted by size is divided by the sum of sizes; the released MAE patch divides by the picture's three "
        "channels, which the norm behind it undoes.",
        "The margin schedule a - b * layer / depth and the per-task settings are those of the code, not of the text; "
        "preset('paper') is the paper's.",
    )

    aliases = (Alias("r", "ratio"), Alias("m", "margin"))
    budget_parameter = "ratio"

    ratio: float | list[float] = 0.9
    margin: float | tuple[float, float] = (0.9, 0.9)
    alpha: float = 1.0
    energy: str = "elu"
    split: str = "alternate"
    protect: str = "all"
    plain: int = 0
    metric: str = "keys"
    weighted: bool = True
    prop_attn: bool = True
    point: str = "mid"
    skip_last: int = 0
    pooling: str = "size"

    def __post_init__(self) -> None:
        for value in self.ratio if isinstance(self.ratio, (list, tuple)) else [self.ratio]:
            check_range(value, "PiToMe", "ratio", 0, 1)
            if value == 0:
                raise ParameterError("PiToMe: ratio=0 is not possible; it is the share of tokens that stay")
        if isinstance(self.ratio, (list, tuple)) and not self.ratio:
            raise ParameterError(f"PiToMe: ratio={self.ratio!r} names no layer; give one share a layer")
        if isinstance(self.margin, (list, tuple)) and len(self.margin) != 2:
            raise ParameterError(f"PiToMe: margin={self.margin!r} must be a number or (a, b) for a - b * layer / depth")
        for value in self.margin if isinstance(self.margin, (list, tuple)) else [self.margin]:
            check_range(value, "PiToMe", "margin", -1, 1)
        check_range(self.alpha, "PiToMe", "alpha", 0)
        check_range(self.plain, "PiToMe", "plain", 0, kind=int)
        check_range(self.skip_last, "PiToMe", "skip_last", 0, kind=int)
        check_choice(self.energy, "PiToMe", "energy", ("elu", "paper", "gaussian"))
        check_choice(self.split, "PiToMe", "split", ("alternate", "halves"))
        if self.protect is None:  # as spec strings read the word none
            self.protect = "none"
        check_choice(self.protect, "PiToMe", "protect", ("all", "none", "first_half", "second_half"))
        check_choice(self.metric, "PiToMe", "metric", ("keys", "hidden"))
        check_choice(self.point, "PiToMe", "point", ("mid", "end"))
        check_flag(self.weighted, "PiToMe", "weighted")
        check_flag(self.prop_attn, "PiToMe", "prop_attn")
        check_choice(self.pooling, "PiToMe", "pooling", POOLINGS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PiToMe:
        """The settings of one released task.

        Args:
            name: ``"paper"`` (keys, margin .9 - .9 l/L, proportional attention), ``"aug"`` (the same without
                proportional attention), ``"deit"``, ``"mae"``, ``"clip"``, ``"llava"``, ``"blip"``, ``"blip2"``.
            overrides: parameters that differ, usually `ratio`.

        Returns:
            The method.

        Raises:
            ParameterError: no such preset or parameter.
        """
        check_choice(name, "PiToMe", "preset", tuple(_PRESETS))
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        """As `prop_attn`."""
        return self.prop_attn

    def sites(self, layout: Layout) -> list[Site]:
        """Every layer of the tower that merges."""
        stage = layout.stage("vision", "PiToMe")
        if isinstance(self.ratio, (list, tuple)):
            check_layers(self.ratio, stage.depth, "PiToMe", "ratio")
        needs = ("keys",) if self.metric == "keys" else ()
        last = stage.depth - self.skip_last
        return [
            Site("vision", i, self.point, needs) for i in layout.layers("vision") if i < last and self._ratio(i) < 1
        ]

    def reduce(self, view: TokenView) -> Reduction | None:
        """Energy, split, match."""
        metric = view.signal("keys") if self.metric == "keys" else view.tokens
        counts = view.counts
        r = self._r(counts)
        if r <= 0:
            return None
        if counts.layer < self.plain:
            keep, src, dst = kernels.bipartite_match(metric, r, view.num_prefix)
        else:
            keep, src, dst = kernels.energy_match(
                metric,
                r,
                margin=self._margin(counts),
                alpha=self.alpha,
                kind=self.energy,
                split=self.split,
                protect=self._protects(counts),
            )
        return Reduction(keep, src, dst) if self.weighted else Reduction.mean(keep, src, dst)

    def count(self, counts: Counts) -> int:
        """Tokens that arrive, less the merged ones."""
        return counts.n - self._r(counts)

    def _ratio(self, layer: int) -> float:
        if not isinstance(self.ratio, (list, tuple)):
            return self.ratio
        return self.ratio[layer] if layer < len(self.ratio) else 1.0

    def _r(self, counts: Counts) -> int:
        ratio = self._ratio(counts.layer)
        if ratio >= 1:
            return 0
        total = counts.n + (counts.num_prefix if counts.layer < self.plain else 0)
        # Written as T - T * ratio in float64, as released; T * (1 - ratio) differs for many T.
        return min(math.floor(total - total * ratio), counts.n // 2)

    def _margin(self, counts: Counts) -> float:
        if not isinstance(self.margin, (list, tuple)):
            return self.margin
        return self.margin[0] - self.margin[1] * counts.layer / counts.depth

    def _protects(self, counts: Counts) -> bool:
        if self.protect in ("all", "none"):
            return self.protect == "all"
        first = counts.layer < math.ceil(counts.depth / 2)
        return first == (self.protect == "first_half")
