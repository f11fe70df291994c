"""TCA: condense a tower's tokens, and correct predictions with the class tokens of reliable pictures."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..core.aliases import Alias
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import random_subset
from ..core.settings import POOLINGS, check_choice, check_flag, check_layer, check_range
from ..core.site import Counts, Layout, Site
from ..core.view import TokenView
from ..errors import MissingSignal, ParameterError
from .condensation import Condensation, condensation, condense, cross_head_rank, from_drop_rate, from_ratio
from .reservoir import POLICIES, Reservoir, layer_weights

RELEASED_SIZE = 3
"""Items of a class, where nothing else is asked for."""

_CONFIG: dict[str, tuple[int, float, float, float]] = {  # reservoir_size, scale, lambd, beta
    "caltech101": (3, 1.0, 7.0, 6.0),
    "dtd": (3, 1.0, 2.0, 6.0),
    "eurosat": (2, 5.0, 8.0, 7.0),
    "fgvc": (3, 0.02, 2.0, 2.0),
    "food101": (3, 0.01, 2.0, 5.0),
    "imagenet": (3, 0.1, 3.0, 5.0),
    "imagenet_a": (3, 0.01, 3.0, 5.0),
    "imagenet_r": (3, 0.1, 3.0, 8.0),
    "imagenet_s": (3, 0.1, 4.0, 8.0),
    "imagenet_v": (3, 0.1, 4.0, 9.0),
    "flowers": (3, 0.01, 7.0, 7.0),
    "pets": (3, 5.5, 2.0, 6.0),
    "cars": (3, 0.1, 1.5, 8.0),
    "sun397": (3, 0.01, 4.0, 3.0),
    "ucf101": (3, 0.01, 6.0, 8.0),
}
_PRESETS: dict[str, dict[str, Any]] = {
    "released": {},
    "paper": {"score": "rank", "fuse": False, "policy": "entropy", "correction": "mean"},
    "condense": {"reservoir_size": 0},
    **{name: dict(zip(("reservoir_size", "scale", "lambd", "beta"), row)) for name, row in _CONFIG.items()},
}


@register_method
@dataclass(eq=False)
class TCA(Method):
    """Condenses a CLIP tower's patches and adapts zero-shot classification to a stream of pictures, without training.

    In three layers patches are ranked by the class token's attention: the best stay, the middle is condensed to a few
    coreset centres, the lowest are fused into one token. A reservoir keeps the class tokens of each class's most
    reliable pictures; the mean of the nearest class joins attention there as an anchor, and similarity to all items
    corrects the logits (`vlmtok.zero_shot`, which calls `finish`).

    The outcome depends on all pictures before, and on their order: `run.reset()` starts anew, `run.state_dict()`
    saves the stream, another list of classes is refused. Where there are no classes (`reservoir_size=0`, or `finish`
    is never called), it only condenses.

    Algorithm:
        1. a_i: class-token attention, mean over heads; of n patches ``m = int(((1 - ratio) n + centers) / 3 + 0.5)``.
        2. By falling `score`: ``n + 1 - 3 m`` patches stay, ``2 m`` are condensed, ``m - 1`` fused into ``sum a_i
           x_i``.
        3. Centres: one by `first`, then ``argmax_i min_c |x_i - x_c|``; the nearest takes a patch by 1 / distance.
        4. A picture enters the reservoir of its predicted class; what `policy` says leaves a full one.
        5. Anchor: the class mean nearest to the class token, inserted into the condensing blocks.
        6. ``logit_c += lambd sum exp(-beta (1 - A))`` over the items of class c, ``A = sum_l w_l cos(cls_l, item_l)``.

    Args:
        ratio: share of patches that a condensing layer keeps (the paper's R): about ``ratio * n + 2`` of n.
        drop_rate: the release's number instead, about a third of 1 - R; then `ratio` has no part. The release runs with
            0.035 (182, 167 and 155 tokens of 197); the token counts of the paper's R = 0.9 (179, 164, 149) take 0.037.
        layers: condensing layers; L/4, L/2 and 3L/4 by default, the release's 3, 6, 9 of 12.
        centers: coreset centres.
        score: rank patches by ``"attn_mean"`` over heads, as released, or by ``"rank"``, the paper's cross-head rank.
        fuse: keep one token for the lowest, weighted by their attention, as released; the paper drops them.
        first: the coreset's first centre: ``"top"``, the patch of highest score; ``"random"``, one draw by `seed` for
            each layer and size; an index among the condensed patches by falling score; or one index a layer.
        seed: of that draw.
        reservoir_size: items of a class; 0 leaves reservoir, anchors and correction out. None is the release's 3 in a
            tower with a class token, and 0 in one without.
        policy: who leaves a full class: ``"diversity"`` or ``"similarity"`` (released, `div` on and off),
            ``"entropy"`` (paper) or ``"fifo"``.
        similarity: compare items by the mean of their class ``"tokens"`` over layers, or by the picture ``"features"``.
        anchor_gate: use anchors once ``"all_classes"`` hold two items, as released, or ``"per_class"``.
        correction: ``"exp"`` sums exp(-beta (1 - a)) over a class's items, as released; ``"mean"`` is the sum of a over
            `reservoir_size`, as in the paper.
        scale: of the layers' weights in a, the weighted mean cosine; small looks at the last layer alone.
        lambd: weight of the correction.
        beta: its sharpness.
        include_self: let a picture that entered the reservoir vote for itself, as released.
        update: False freezes the reservoir (`run.memory().frozen` later).
        batch_mode: ``"sequential"`` takes pictures one by one, ``"synchronous"`` a batch with the anchors from before
            it, then updates and corrects in order; the two differ.
        pooling: what a merged token counts in a head that pools tokens: ``"size"`` weights means by size; ``"plain"``
            counts it once; ``"attention"`` also adds log(size) to an attention pool's logits.
    """

    paper = "Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation (ICCV 2025)"
    arxiv = "2410.14729"
    code = "https://github.com/Jo-wang/TCA"
    parity = "streams index-exact with the release, blocks 1e-5, a tiny tower end to end 2e-4 (tca_*)"
    caveats = (
        "It loses to Random on tiny-llava at 72 tokens (81.7 % against 93.0 %): it was made for classification, "
        "and drops by class attention from the tower's first layers on, which on that checkpoint fall on things "
        "no more than on the rest (0.22 of the attention in layer 0, as of the area).",
    )
    deviations = (
        "score='rank', fuse=False, policy='entropy' and correction='mean' follow descriptions of the paper; they are "
        "not in the release.",
        "ratio is the paper's R and is solved into the release's integers; drop_rate takes the release's number.",
        "A layer that would not get shorter is left alone; the release rewrites it.",
        "A centre that copies an earlier one keeps itself; the release emits a zero token. Nothing is rounded to fp16.",
        "The first centre is not drawn from global random numbers.",
        "A batch is several pictures; the release takes it for views of one.",
        "Equal entropies and similarities evict the lowest index; the release divides by zero.",
        "Logits with NaN change nothing.",
        "Towers without a class token condense by received attention, without a reservoir.",
    )

    aliases = (Alias("R", "ratio"), Alias("M", "reservoir_size"), Alias("lambda", "lambd"))
    budget_parameter = "ratio"

    ratio: float = 0.9
    drop_rate: float | None = None
    layers: int | tuple[int, ...] | list[int] | None = None
    centers: int = 4
    score: str = "attn_mean"
    fuse: bool = True
    first: str | int | tuple[int, ...] | list[int] = "top"
    seed: int = 0
    reservoir_size: int | None = None
    policy: str = "diversity"
    similarity: str = "tokens"
    anchor_gate: str = "all_classes"
    correction: str = "exp"
    scale: float = 0.1
    lambd: float = 3.0
    beta: float = 5.0
    include_self: bool = True
    update: bool = True
    batch_mode: str = "sequential"
    pooling: str = "size"

    def __post_init__(self) -> None:
        check_range(self.ratio, "TCA", "ratio", 0, 1)
        if self.drop_rate is not None:
            check_range(self.drop_rate, "TCA", "drop_rate", 0, 1)
        check_range(self.centers, "TCA", "centers", 1, kind=int)
        for layer in self.layers if isinstance(self.layers, (tuple, list)) else [self.layers]:
            check_layer(layer, "TCA", "layers")
        check_choice(self.score, "TCA", "score", ("attn_mean", "rank"))
        if isinstance(self.first, str):
            check_choice(self.first, "TCA", "first", ("top", "random"))
        else:
            if self.first in ((), []):
                raise ParameterError(f"TCA: first={self.first!r} names no centre; give one for each condensing layer")
            for index in self.first if isinstance(self.first, (tuple, list)) else [self.first]:
                check_range(index, "TCA", "first", 0, kind=int)
        check_range(self.seed, "TCA", "seed", kind=int)
        if self.reservoir_size is not None:
            check_range(self.reservoir_size, "TCA", "reservoir_size", 0, kind=int)
        check_choice(self.policy, "TCA", "policy", POLICIES)
        check_choice(self.similarity, "TCA", "similarity", ("tokens", "features"))
        check_choice(self.anchor_gate, "TCA", "anchor_gate", ("all_classes", "per_class"))
        check_choice(self.correction, "TCA", "correction", ("exp", "mean"))
        check_range(self.scale, "TCA", "scale", 1e-6)
        check_range(self.lambd, "TCA", "lambd", 0)
        check_range(self.beta, "TCA", "beta", 0)
        for name in ("fuse", "include_self", "update"):
            check_flag(getattr(self, name), "TCA", name)
        check_choice(self.batch_mode, "TCA", "batch_mode", ("sequential", "synchronous"))
        check_choice(self.pooling, "TCA", "pooling", POOLINGS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TCA:
        """Named settings.

        Args:
            name: ``"released"`` (the defaults), ``"paper"`` where it differs from the release, ``"condense"`` (no
                reservoir), or the released configuration of a data set, tuned on it: ``"imagenet"``, ``"imagenet_a"``
                (``_r``, ``_s``, ``_v``), ``"caltech101"``, ``"dtd"``, ``"eurosat"``, ``"fgvc"``, ``"food101"``,
                ``"flowers"``, ``"pets"``, ``"cars"``, ``"sun397"``, ``"ucf101"``.
            overrides: parameters that differ.

        Returns:
            The method.

        Raises:
            ParameterError: no such preset or parameter.
        """
        check_choice(name, "TCA", "preset", tuple(_PRESETS))
        return cls(**{**_PRESETS[name], **overrides})

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """Moves the number that is in force."""
        if self.drop_rate is None:
            return super().at_level(level, layout, tokens)
        return replace(self, drop_rate=1.0 - level)

    # ------------------------------------------------------------------ condensation
    def sites(self, layout: Layout) -> list[Site]:
        """Class tokens behind every layer, anchors before and condensation inside the condensing ones."""
        depth = layout.stage("vision", "TCA").depth
        condensing = layout.layers("vision", self._layers(depth), "TCA")
        self._condensing(depth)
        classed = layout.gives("vision", "cls_attention")
        if not classed and self._items(layout) and not layout.stages["vision"].why:
            raise MissingSignal(
                f"TCA keeps class tokens, and the tower of {layout.family} has none; reservoir_size=0 condenses there"
            )
        score = "cls_attention" if classed else "received_attention"
        sites = [Site("vision", layer, "mid", (score,)) for layer in condensing]
        if self._items(layout):
            sites += [Site("vision", layer, "start", ("protected",)) for layer in condensing if layer > 0]
            sites += [Site("vision", layer, "end", ("protected",)) for layer in layout.layers("vision")]
        return sites

    def remarks(self, layout: Layout) -> list[str]:
        """That there is no reservoir where it chose so by itself."""
        if self.reservoir_size is not None or self._items(layout):
            return []
        return [
            f"TCA condenses by received attention and corrects nothing (reservoir_size=0): the tower of "
            f"{layout.family} has no class token"
        ]

    def _items(self, layout: Layout) -> int:
        """Items of a class on a model; what its signals are missing for is for others to say."""
        if self.reservoir_size is not None:
            return self.reservoir_size
        vision = layout.stage("vision", "TCA")
        return RELEASED_SIZE if layout.gives("vision", "cls_attention") or vision.why else 0

    def reduce(self, view: TokenView) -> Reduction | None:
        """Condenses between attention and MLP; notes the class token behind a layer."""
        if view.site.point == "end":
            view.row[f"cls.{view.layer}"] = view.signal("protected")[:, 0]
        if view.site.point != "mid":
            return None
        counts = view.counts
        plan = self._plan(counts.n)
        if plan is None:
            return None
        if view.has("cls_attention"):
            attention = view.signal("cls_attention").float()
        else:
            attention = view.signal("received_attention").float().unsqueeze(1)
        weight = attention.mean(1)
        score = cross_head_rank(attention) if self.score == "rank" else weight
        index, batch, device = self._first(plan.middle, counts), len(view.tokens), view.tokens.device
        if index is None:
            first = random_subset(plan.middle, 1, self.seed, str(counts.site)).to(device).expand(batch)
        else:
            first = torch.full((batch,), index, dtype=torch.int64, device=device)
        return condense(view.tokens, score, weight, plan, first)

    def count(self, counts: Counts) -> int:
        """What condensation leaves; everything at other sites.

        Raises:
            ParameterError: the coreset's first centre does not exist.
        """
        plan = self._plan(counts.n) if counts.site.point == "mid" else None
        if plan is None:
            return counts.n
        self._first(plan.middle, counts)
        return plan.slots

    def insert(self, view: TokenView) -> Tensor | None:
        """The anchor nearest to the class token `[B, 1, C]`, while there are anchors."""
        memory = view.memory
        if not isinstance(memory, Reservoir) or not memory.active or view.layer == 0:
            return None
        return memory.anchor(view.signal("protected")[:, 0], view.layer - 1).unsqueeze(1)

    def build(self, layout: Layout) -> nn.Module | None:
        """The reservoir, empty."""
        size = self._items(layout)
        if not size:
            return None
        return Reservoir(size, self.anchor_gate, frozen=not self.update)

    # ------------------------------------------------------------------ adaptation
    def finish(self, logits: Tensor, row: MutableMapping[str, Any], memory: nn.Module | None) -> Tensor:
        """Takes the pictures of the last forward into the reservoir and corrects their logits.

        Args:
            logits: `[B, classes]`, scaled as for the softmax.
            row: of that forward. Beside what this method noted, ``features`` `[B, E]` (needed for
                ``similarity="features"``) and ``text_features`` `[classes, E]` (checked against the reservoir's).
            memory: the reservoir.

        Returns:
            `[B, classes]`.

        Raises:
            ParameterError: another list of classes; several pictures in sequential mode; no class tokens were noted.
        """
        if not isinstance(memory, Reservoir):
            return logits
        names = sorted((name for name in row if name.startswith("cls.")), key=lambda name: int(name[4:]))
        if not names:
            raise ParameterError(
                "TCA: no class tokens were noted; run the compressed tower before correcting its logits"
            )
        if self.batch_mode == "sequential" and len(logits) != 1:
            raise ParameterError(
                f"TCA: batch_mode='sequential' takes one picture at a time, got {len(logits)}; "
                "batch_mode='synchronous' takes batches"
            )
        # What the reservoir keeps must outlive an inference mode that the caller may be in.
        with torch.inference_mode(False), kernels.exact(logits.device):
            memory.check_vocabulary(logits.shape[1], row.get("text_features"))
            tokens = torch.stack([row[name] for name in names], 1).detach()
            features = row.get("features") if self.similarity == "features" else None
            if self.similarity == "features" and features is None:
                raise ParameterError("TCA: similarity='features' needs the picture features in row['features']")
            corrected = [
                self._adapt(one, tokens[i], None if features is None else features[i].detach(), memory)
                for i, one in enumerate(logits)
            ]
            return torch.stack(corrected)

    def _adapt(self, logits: Tensor, tokens: Tensor, feature: Tensor | None, memory: Reservoir) -> Tensor:
        """Update, then correction, for one picture."""
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum()
        if bool(entropy.isnan()):
            return logits
        place, label = None, int(logits.argmax())
        if not memory.frozen:
            place = memory.add(label, tokens, entropy, feature, self.policy, len(logits))
        if not memory.classes:
            return logits
        alike, where = memory.affinity(tokens, layer_weights(len(tokens), self.scale))
        if self.correction == "exp":
            vote = torch.exp(-self.beta * (1.0 - alike))
        else:
            vote = alike / (self.reservoir_size or RELEASED_SIZE)
        if not self.include_self and place is not None:
            vote = torch.where((where[:, 0] == label) & (where[:, 1] == place), 0.0, vote)
        votes = torch.zeros_like(log_p).index_add(0, where[:, 0].to(log_p.device), vote.to(log_p.device))
        return (logits.float() + self.lambd * votes).to(logits.dtype)

    # ------------------------------------------------------------------ settings
    def _layers(self, depth: int) -> list[int]:
        if self.layers is None:
            return sorted({depth // 4, depth // 2, 3 * depth // 4})
        return [self.layers] if isinstance(self.layers, int) else list(self.layers)

    def _condensing(self, depth: int) -> list[int]:
        """Condensing layers, ascending.

        Raises:
            ParameterError: `first` has not one index for each.
        """
        found = sorted(layer % depth for layer in self._layers(depth))
        if isinstance(self.first, (tuple, list)) and len(found) != len(self.first):
            raise ParameterError(f"TCA: first={self.first!r} must have one index for each of layers {found}")
        return found

    def _plan(self, n: int) -> Condensation | None:
        """Where n patches go; None where the layer would not get shorter (`drop_rate` may keep the count)."""
        released = self.drop_rate is not None
        m = from_ratio(self.ratio, n, self.centers) if self.drop_rate is None else from_drop_rate(self.drop_rate, n)
        plan = condensation(n, m, self.centers, self.fuse)
        return plan if plan.slots < n or (released and plan.slots == n and plan.fused) else None

    def _first(self, middle: int, counts: Counts) -> int | None:
        """The first centre among the condensed patches; None where it is drawn at random.

        Raises:
            ParameterError: there is no such patch, or no index for this layer.
        """
        if self.first == "random":
            return None
        if isinstance(self.first, (tuple, list)):
            index = self.first[self._condensing(counts.depth).index(counts.layer)]
        else:
            index = 0 if self.first == "top" else int(self.first)
        if index >= middle:
            raise ParameterError(f"TCA: first={index} does not exist among {middle} condensed patches")
        return index
