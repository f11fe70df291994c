"""What was left of a picture behind each cut, in order and in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.site import Site
from ..core.trace import PictureTrace

PLACES = {
    "vision": "vision tower",
    "features": "between tower and projector",
    "projected": "in front of the language model",
    "decoder": "language model",
    "cache": "key-value cache",
}
"""By stage, where a cut was."""

CACHES = "key-value caches"
"""Where entries leave them."""

POINTS = {"start": "in front of layer", "mid": "inside layer", "end": "behind layer"}


@dataclass(frozen=True, eq=False)
class State:
    """What was left of a picture at one moment of a pass.

    Attributes:
        label: where the cut was; of the first state, that there was none.
        method: whose cut it was; empty where that is not known.
        site: of the cut, or None.
        owner: int64 `[patches]`, see `vlmtok.core.trace.PictureTrace`.
        held: of caches, fp32 `[patches]`, in how many layers each patch is held; else None.
        layers: of how many.
    """

    label: str
    method: str
    site: Site | None
    owner: Tensor
    held: Tensor | None = None
    layers: int = 0

    @property
    def tokens(self) -> int:
        """How many were left."""
        return int(self.owner[self.owner >= 0].unique().numel())

    @property
    def where(self) -> str:
        """Where the cut was, as the end of a sentence."""
        return f"in the {self.label}" if self.site is not None and self.site.layer is not None else self.label

    @property
    def title(self) -> str:
        """Where, and how many tokens were left; of caches, in how many layers a patch is held."""
        by = f" ({self.method})" if self.method else ""
        if self.held is not None:
            mean = float(self.held.mean()) if self.held.numel() else 0.0
            return f"{self.label}{by}: patches held in {mean:.1f} of {self.layers} layers on average"
        return f"{self.label}{by}: {self.tokens} of {self.owner.numel()} tokens"


def place_of(site: Site) -> str:
    """A site in words; layers are 0-based, as everywhere."""
    if site.layer is None:
        return PLACES[site.stage]
    if site.stage == "cache":
        return f"{PLACES['cache']} of layer {site.layer}"
    return f"{PLACES.get(site.stage, site.stage)}, {POINTS[site.point]} {site.layer}"


def states_of(trace: PictureTrace) -> list[State]:
    """What was left of a picture, from all of it to the end of the pass.

    Args:
        trace: of the picture.

    Returns:
        First the state before any cut, then one for each cut that changed something. What changed the patches without
        a recorded cut is one more, at the end; so is what caches hold, where entries left them.
    """
    found = [State("before any cut", "", None, torch.arange(trace.patches))]
    methods = trace.methods or ("",) * len(trace.steps)
    for (site, owner), method in zip(trace.steps, methods):
        # Behind a projector that joins patches, the tower's steps are of other patches than the language model's.
        if owner.shape == trace.owner.shape and not torch.equal(owner, found[-1].owner):
            found.append(State(place_of(site), method, site, owner))
    if not torch.equal(trace.owner, found[-1].owner):
        found.append(State("at the end", "", None, trace.owner))
    if trace.cached is not None:
        held, layers = trace.held_in(), int((~trace.cached.isnan().any(1)).sum())
        if bool((held < layers).any()):
            found.append(State(CACHES, " + ".join(trace.cached_by), None, found[-1].owner, held, layers))
    return found


def spread(count: int, most: int) -> list[int]:
    """Evenly spaced places among so many, the last one with them; all of them where they are few."""
    if count <= most:
        return list(range(count))
    return [round((i + 1) * count / most) - 1 for i in range(most)]


def gone_at(states: list[State]) -> list[int | None]:
    """For each patch, the first state in which it is dropped; None where it is left."""
    found: list[int | None] = [None] * states[0].owner.numel()
    for number, state in enumerate(states):
        for patch in (state.owner < 0).nonzero()[:, 0].tolist():
            if found[patch] is None:
                found[patch] = number
    return found
