"""PrefixKV: one level of attention mass for all layers says how many entries each layer's cache keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.aliases import Alias, share_that_goes
from ..core.cache_scores import COMPRESSION_RATIO, ScoredCache, over_heads
from ..core.layer_profile import LayerProfile, as_profile
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import chosen_first, keep_top, ranked
from ..core.settings import keep_count
from ..core.site import Counts, Layout
from ..core.view import TokenView
from ..errors import ParameterError

TOLERANCE = 5.0
"""How far from the target the release's bisection may end, in entries of all layers."""


# ---------------------------------------------------------------------- as released, over all columns
def prefixes(mass: Tensor) -> Tensor:
    """Share of the mass that the best columns hold together.

    Args:
        mass: `[..., N]`, not negative; NaN counts as none.

    Returns:
        fp32 `[..., N]`, rising to 1; place i is of the i + 1 best columns.
    """
    mass = mass.float().nan_to_num(0.0)
    return (mass / mass.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True).values.cumsum(-1)


def bisected(score: Tensor, forget: float, protect: int = 0) -> Tensor:
    """Columns that each layer forgets at the level of mass where all together forget about a share.

    Args:
        score: `[L, N]`, attention mass of each layer's columns.
        forget: share that goes, of all columns of all layers.
        protect: columns of each layer that stay besides those that reach the level.

    Returns:
        int64 `[L]`; their sum is within `TOLERANCE` of the share unless counts jump by more (60 halvings, then the
        last level that was tried).
    """
    layers, n = score.shape
    held, target = prefixes(score), forget * n * layers
    low, high = 0.0, 1.0
    found = torch.zeros(layers, dtype=torch.int64)
    for _ in range(60):
        level = (low + high) / 2
        wanted = torch.full((layers, 1), level, device=score.device, dtype=held.dtype)
        reach = torch.searchsorted(held, wanted).squeeze(1) + 1
        found = (n - reach - protect).clamp(min=0)
        over = float(found.sum()) - target
        if abs(over) < TOLERANCE:
            break
        low, high = (level, high) if over > 0 else (low, level)
    return found


def allocate(score: Tensor, forget: float, protect: int = 0) -> list[int]:
    """How many columns each layer forgets, as the release says without a profile.

    It waits for the device and may miss the share by an entry a layer; the method itself does neither.

    Args:
        score: `[L, N]`, attention mass of each layer's columns, mean over heads, sum over all rows.
        forget: share that goes, of all columns of all layers.
        protect: columns of each layer that stay anyway: the first `start` and the last.

    Returns:
        L numbers: those of `bisected`, rescaled to the share and truncated.
    """
    found = bisected(score, forget, protect).tolist()
    target, total = forget * score.numel(), sum(found)
    return [int(one * target / total) if total else 0 for one in found]


def retained(score: Tensor, forget: Sequence[int], start: int, last: int) -> list[Tensor]:
    """Columns that each layer keeps, as released.

    Args:
        score: `[L, N]`.
        forget: how many columns each layer forgets; more than it can leaves the protected ones.
        start: first columns that stay.
        last: last columns that stay.

    Returns:
        For each layer int64 `[K_l]`, ascending: the protected columns, and of the others those of highest score; the
        lowest column wins a tie.
    """
    found = []
    for row, count in zip(score, forget, strict=True):
        n = row.shape[0]
        inner = row[start : n - last]
        best = keep_top(inner[None], max(0, inner.shape[0] - count))[0] + start
        ends = torch.arange(n, device=row.device)
        found.append(torch.cat([ends[:start], best, ends[n - last :]]))
    return found


# ---------------------------------------------------------------------- ours
def levelled(masses: Sequence[Tensor], total: int) -> Tensor:
    """How many entries each layer keeps, so that each holds the same share of its mass, and all together a number.

    An entry is needed from the level on that those before it in its layer do not reach; the entries that are needed
    first stay. Where several are needed from one level on, those of largest share go first, then those of lowest rank,
    then those of the first layers. So the sum is exact, and a larger total never leaves a layer fewer.

    Args:
        masses: of each layer `[B, N_l]`, attention mass of its entries; NaN counts as none. A layer without any mass
            counts as one whose entries are alike.
        total: entries of all layers that stay, at least one for each layer that has some.

    Returns:
        int64 `[B, L]`.
    """
    batch, most = masses[0].shape[0], max(mass.shape[1] for mass in masses)
    shares, needed = [], []
    for mass in masses:
        held = mass.double().nan_to_num(0.0).sort(dim=1, descending=True).values
        n = held.shape[1]
        held = torch.where(held.sum(1, keepdim=True) > 0, held, 1.0)
        reached = held.cumsum(1)
        whole = reached[:, -1:]
        share, before = held / whole, torch.cat([torch.full_like(whole, -1.0), reached[:, :-1] / whole], 1)[:, :n]
        shares.append(torch.cat([share, share.new_full((batch, most - n), -1.0)], 1))
        needed.append(torch.cat([before, before.new_full((batch, most - n), 2.0)], 1))
    share, level = (torch.stack(table, 2).flatten(1) for table in (shares, needed))  # rank by rank, layers inside
    order = share.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, level.gather(1, order).argsort(dim=1, stable=True))[:, :total]
    chosen = torch.zeros_like(share, dtype=torch.int64).scatter(1, order, 1)
    return chosen.unflatten(1, (most, len(masses))).sum(1)


@register_method
@dataclass(eq=False)
class PrefixKV(ScoredCache):
    """Gives every layer's cache the budget that holds the same share of its attention mass, behind the prefill.

    Layers differ in how many entries hold most of their attention. All entries of all layers share one budget; one
    level of mass, the same for all layers, spends it. All pictures of a prompt share it, too.

    With a `profile` the budgets are known beforehand: shares of layers, by `vlmtok.calibrate` or by hand, read for the
    depth of the model by interpolation and scaled so that they meet `keep`. Without one they follow from the prompt.

    Algorithm:
        1. ``I_l,n``: attention that entry n of layer l gets, summed over all rows of the prompt, mean over heads.
        2. Sort I_l by falling value, divided by its sum; ``c_l``: its cumulative sums.
        3. Layer l keeps the ``k_l(p)`` first of them that reach the level p: the least k with ``c_l,k >= p``.
        4. p is the largest level at which ``sum_l k_l(p)`` is at most ``keep N L``; what is missing goes one by one to
           layers whose next entry has the largest share, so that the sum is exact.
        5. The k_l entries of highest I_l stay in layer l's cache; all heads keep the same.

    Args:
        keep: share (float) of the entries of all layers that stay, or how many (int) a layer keeps on average.
        layers: 0-based layers whose caches lose entries and share the budget; negatives count from the end. None is
            all that can.
        profile: path of a JSON file, a mapping with ``shares``, or a tuple of the shares: one for each layer, of the
            entries that stay. None decides by the prompt.
    """

    paper = (
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation "
        "(NeurIPS 2025)"
    )
    arxiv = "2412.03409"
    code = "https://github.com/THU-MIG/PrefixKV"
    parity = "allocation and kept sets exact with the release, as functions over all columns (prefixkv_*)"
    deviations = (
        "Visual entries alone are budgeted and leave; the release budgets the whole prompt, so that the same share "
        "keeps more here, and its figures are not ours.",
        "No entry is protected: text stays anyway. The release protects the first start_size columns (4 by default, 1 "
        "in its evaluation) and the last.",
        "The sum over layers is exactly what keep says, one entry a layer at least. The release ends within 5 of it, "
        "rescales and truncates.",
        "The level is found by sorting, so that it always ends; the release's bisection never does where counts jump "
        "by more than its tolerance, as those of identical layers do.",
        "Tokens that are generated get their true positions; the release counts them by what layer 0's cache holds.",
        "Nothing leaves while it decodes. The release then lets one entry a layer go at a fixed place, by no score, so "
        "that all but the 25 newest of what comes goes.",
        "A profile holds shares that stay, and is scaled to keep; the release's hold shares that go, one for each "
        "budget. How it averages samples is not in the code.",
        "Batches go row by row; scores are fp32. Equal scores go to the lowest index, the release's to any.",
    )
    caveats = (
        "Sums over all rows favour entries that came first: at 10 % of the cache's bytes 75 % of 100 scenes-vqa "
        "questions are right (SnapKV 92, random entries 71), at 50 % 98, as without.",
        "With a profile and layers= of its own, or layers whose caches cannot lose entries, keep is met over all "
        "layers of the model, and not over those that act.",
    )
    aliases = (
        share_that_goes("ratio", "keep", "PrefixKV", "the released code"),
        COMPRESSION_RATIO,
        Alias("start_size", instead="no entry of a picture is protected, and text never leaves; leave it out"),
    )
    scope = "sample"
    needs: ClassVar[tuple[str, ...]] = ("attention_mass",)

    profile: str | os.PathLike[str] | Mapping[str, Any] | tuple[float, ...] | LayerProfile | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shares = None if self.profile is None else as_profile(self.profile, "PrefixKV")

    def plan(self, views: Sequence[TokenView]) -> None:
        """Spends the budget over the layers; the numbers are read on the host, all at once."""
        if self._shares is not None or all(self.count(view.counts) == view.counts.n for view in views):
            return
        total = self._total([view.counts for view in views])
        kept = levelled([over_heads(view.signal("attention_mass")) for view in views], total)
        numbers = [None] * len(views) if kept.is_meta else kept.T.tolist()  # the one wait for the device
        for view, each in zip(views, numbers, strict=True):
            view.row[_noted(view)] = each

    def score(self, view: TokenView) -> Tensor:
        """Attention mass, mean over heads, fp32 `[B, N]`."""
        return over_heads(view.signal("attention_mass"))

    def reduce(self, view: TokenView) -> Reduction | None:
        """The entries of highest mass, as many as the layer keeps; rows may differ.

        Raises:
            ParameterError: there is no profile, and `plan` was not asked of the layers before.
        """
        n, score = view.counts.n, self.score
        k = self.count(view.counts)
        if k is not None:
            return None if k == n else Reduction(keep_top(score(view), k))
        if _noted(view) not in view.row:
            raise ParameterError(
                f"PrefixKV has no plan for {view.site}; plan(views) looks at all layers before, or a profile says what "
                "each keeps"
            )
        numbers = view.row[_noted(view)]
        if numbers is None:  # no data: any entry may stay
            return Reduction(ranked(score(view)), valid=torch.ones_like(score(view), dtype=torch.bool))
        most = max(numbers)
        if min(numbers) == most:
            return None if most == n else Reduction(keep_top(score(view), most))
        rank = ranked(score(view)).argsort(dim=1)
        slots, valid = chosen_first(rank < torch.tensor(numbers, device=rank.device)[:, None])
        return Reduction(slots[:, :most], valid=valid[:, :most])

    def count(self, counts: Counts) -> int | None:
        """As the profile says; None without one, where content decides."""
        if self._shares is not None:
            return self._shares.entries(self.keep, counts.n, counts.depth)[counts.layer]
        whole = self.keep == 1.0 if isinstance(self.keep, float) else self.keep >= counts.entered
        return counts.n if whole else None

    def remarks(self, layout: Layout) -> list[str]:
        """Where a profile is of another depth, or for another budget."""
        if self._shares is None or "cache" not in layout.stages:
            return []
        said, depth, given = [], layout.stages["cache"].depth, self._shares
        if len(given.shares) != depth:
            said.append(f"the profile has {len(given.shares)} layers, interpolated to the {depth} of {layout.family}")
        if given.keep is not None and isinstance(self.keep, float) and abs(given.keep - self.keep) > 1e-9:
            said.append(f"the profile was made for keep={given.keep:g}, scaled to keep={self.keep:g}")
        return [f"PrefixKV: {'; '.join(said)}"] if said else []

    def together(self, counts: Sequence[Counts]) -> int | None:
        """What `keep` says of all layers; None where nothing leaves."""
        return None if counts[0].entered <= self.min_tokens else self._total(counts)

    def _total(self, counts: Sequence[Counts]) -> int:
        """Entries of all layers that stay."""
        held = [one.n for one in counts if one.n]
        total = (
            keep_count(self.keep, sum(held)) if isinstance(self.keep, float) else sum(min(self.keep, n) for n in held)
        )
        return max(total, len(held))

    def __str__(self) -> str:
        if isinstance(self.profile, (Mapping, LayerProfile)):
            return f"{replace(self, profile=None)}:profile=given"
        if isinstance(self.profile, os.PathLike):
            return str(replace(self, profile=os.fspath(self.profile)))
        return super().__str__()


def _noted(view: TokenView) -> str:
    """Where a plan notes what a layer keeps."""
    return f"kept at {view.layer}"
