"""Where a method acts on a model: the sites that it names, moved to layers that can give it what it needs.

Some layers of a language model have no attention rows: recurrent ones, convolutions, those of an unknown form. A site
that asks for rows of such a layer moves to the next layer that has some, never to an earlier one, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import MissingSignal, ParameterError, SiteError, VlmtokError
from .method import Method
from .signals import BY_ATTENTION, Need, check_stage, resolve_need
from .site import LAYERED, POINTS, Counts, Layout, Site

PATCHES = 576
"""A number of patches; whether a method's count depends on content shows with any."""
FRAMES = 4
"""Frames that these are, for what acts on clips alone."""


@dataclass(frozen=True)
class Placed:
    """A site of a method on a model.

    Attributes:
        site: where it acts.
        asked: the site that the method named: what it counts by, and what its views show.
        needs: its signals, resolved.
    """

    site: Site
    asked: Site
    needs: tuple[Need, ...] = ()

    @property
    def key(self) -> tuple[str, int, int]:
        """Sorts places of a stage by the forward."""
        return _key(self.site)


def looks_on(method: Method, site: Site, layout: Layout) -> bool:
    """Whether a method only observes at a site: by its count no token leaves there.

    Args:
        method: the method.
        site: one that it names.
        layout: what the model offers.
    """
    return type(method).count is not Method.count and sample_count(method, site, layout) == PATCHES


def sample_count(method: Method, site: Site, layout: Layout, grid: tuple[int, int] | None = None) -> int | None:
    """What a method's count says of `PATCHES` tokens, which tells whether it decides at a site, and by content.

    Args:
        method: the method.
        site: one that it names.
        layout: what the model offers.
        grid: rows and columns of them, where those are no content.

    Returns:
        The count; 0 where it refuses so many: it decides there, and the tokens of a real picture may be fine.
    """
    stage = layout.stages[site.stage]
    try:
        clip = (FRAMES, PATCHES // FRAMES)
        entered = max(PATCHES, method.min_tokens + 1)  # of a picture that is large enough
        return method.count(Counts(site, PATCHES, entered, stage.num_prefix, stage.depth, grid, *clip))
    except ParameterError:
        return 0


def place(method: Method, layout: Layout, user: frozenset[str] = frozenset()) -> tuple[list[Placed], list[str]]:
    """Finds where a method acts.

    Args:
        method: the method.
        layout: what the model offers.
        user: names of the signals that the user gives.

    Returns:
        The places, in the order in which the method names them, and what a reader of reports must know of those that
        moved. Sites behind the last layer that anybody reads are left out.

    Raises:
        SiteError: the model has not one of the sites, or two cuts fall on one layer and the method does not join them.
        MissingSignal: a signal that the model cannot give.
    """
    by = type(method).__name__
    sites = _sites(method, layout)
    if len({_key(site) for site in sites}) != len(sites):
        raise SiteError(f"{by} names the same site twice: {', '.join(map(str, sites))}")
    try:
        for site in sites:
            check_stage(site, layout, by)
    except SiteError as problem:
        raise _with_remedy(problem, method, layout) from None
    read = [site for site in sites if site.layer is None or site.layer <= layout.stages[site.stage].last]
    found = [Placed(_seeing(site, layout, user, by), site) for site in read]
    joined = _overtaken(found, method, layout)
    if joined and not method.joins_cuts:
        raise SiteError(
            f"{by}: {_blind_layers((one.asked for one in joined), layout)}, and the next layer that has some is one at "
            f"or behind which {by} cuts too; name layers that are farther apart"
        )
    kept = [
        replace(one, needs=tuple(resolve_need(need, one.site, layout, user, by) for need in one.site.needs))
        for one in found
        if one not in joined
    ]
    return kept, _said(method.spec_name(), kept, joined, layout)


def _sites(method: Method, layout: Layout) -> list[Site]:
    """The sites of a method, with what it says of caches in front of them."""
    sites = method.sites(layout)
    if not getattr(method, "forget", False):
        return sites
    if not any(site.stage == "decoder" for site in sites):
        raise SiteError(
            f"{method}: forget=True is for tokens that leave between layers, and none does with these settings"
        )
    layout.stage("cache", type(method).__name__)
    return [replace(site, forget=True) if site.stage == "decoder" else site for site in sites]


def _key(site: Site) -> tuple[str, int, int]:
    return site.stage, -1 if site.layer is None else site.layer, POINTS.index(site.point)


def _seeing(site: Site, layout: Layout, user: frozenset[str], by: str) -> Site:
    """The site, or the same at the next layer that has the attention rows that it asks for."""
    stage = layout.stages[site.stage]
    asked = [need for need in site.needs if need in (stage.provides & BY_ATTENTION) - user]
    if site.layer is None or site.layer not in stage.blind or not asked:
        return site
    layer = stage.seeing(site.layer, site.point)
    if layer is None:
        raise MissingSignal(
            f"{by} needs the signal {asked[0]!r} at {site}, but no attention rows can be derived there "
            f"({stage.blind[site.layer]}), nor at any later layer of {layout.family} at whose {site.point} tokens can "
            "leave"
        )
    return replace(site, layer=layer)


def _overtaken(found: list[Placed], method: Method, layout: Layout) -> list[Placed]:
    """Cuts that moved as far as a later cut of the method, or past it: that one has the last word there."""
    cuts = [one for one in found if one.site.stage in LAYERED and not looks_on(method, one.asked, layout)]
    return [
        one
        for one in cuts
        if one.site != one.asked
        and any(_later(other.asked, one.asked) and not _later(other.site, one.site) for other in cuts)
    ]


def _later(site: Site, other: Site) -> bool:
    return site.stage == other.stage and _key(site) > _key(other)


def _said(name: str, kept: list[Placed], joined: list[Placed], layout: Layout) -> list[str]:
    """A sentence for each layer to which cuts moved."""
    said = []
    for one in sorted(kept, key=lambda one: one.key):
        left = [other for other in joined if _later(one.asked, other.asked)]
        joined = [other for other in joined if other not in left]
        asked = [other.asked for other in (*left, *([one] if one.site != one.asked else []))]
        if asked and one.site == one.asked:
            said.append(f"{name}: {_blind_layers(asked, layout)}; what would leave there leaves at {one.site}")
        elif asked:
            once = f", once, as it would at {one.asked}" if left else ""
            said.append(f"{name}: {_blind_layers(asked, layout)}; it acts at {one.site}{once}")
    return said


def _blind_layers(asked: Iterable[Site], layout: Layout) -> str:
    """Layers of sites, and why they have no attention rows, in words."""
    by_why: dict[str, list[int]] = {}
    stage = ""
    for site in sorted(asked, key=_key):
        stage, layer = site.stage, site.layer or 0
        why = layout.stages[stage].blind.get(layer, "")
        by_why.setdefault(why, []).append(layer)
    parts = []
    for why, layers in by_why.items():
        many = len(layers) > 1
        numbers = ", ".join(map(str, layers))
        has = ("have" if many else "has") + " no attention rows"
        parts.append(f"{stage} layer{'s' * many} {numbers} {has} ({why})")
    return " and ".join(parts)


def _with_remedy(problem: SiteError, method: Method, layout: Layout) -> SiteError:
    """The error with a setting under which the method runs on the model, where its own schedule is what does not."""
    fitted = method.fitted(layout) if layout.has("decoder") else None
    if fitted is None:
        return problem
    try:
        place(fitted, layout)
    except VlmtokError:
        return problem
    return SiteError(f"{problem}; {fitted} spreads its schedule over the layers before that")
