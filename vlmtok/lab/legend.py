"""What an overlay shows, in words, from what ran."""

from __future__ import annotations

from ..core.trace import PictureTrace
from .states import states_of

WHERE = {
    "vision": "left inside the tower",
    "features": "left before the projector",
    "projected": "left before the language model",
}
"""By stage, what became of a patch dropped there; between layers of the language model the layers are named."""


def legend(trace: PictureTrace) -> str:
    """How to read the overlay of a picture.

    Args:
        trace: of the picture.

    Returns:
        One line: what stayed, what was merged, and where the others left.
    """
    sizes = trace.group_sizes()
    said = []
    if bool((sizes == 1).any()):
        said.append("clear patches stayed")
    if bool((sizes > 1).any()):
        said.append("one colour and outline is one merged group")
    gone = [site for site in trace.dropped_at() if site is not None]
    for stage, words in WHERE.items():
        if any(site.stage == stage for site in gone):
            said.append(f"dark ones {words}")
    layers = sorted({site.layer for site in gone if site.stage == "decoder" and site.layer is not None})
    if layers:
        said.append(f"dim ones left in the language model, at layer {', '.join(map(str, layers))}")
    held = states_of(trace)[-1]
    if not gone and bool((sizes == 1).all()):
        said = ["every patch stayed"] if held.held is None else []
    if held.held is not None:
        least, most = int(held.held.min().floor()), int(held.held.max().ceil())
        of = str(least) if least == most else f"{least} to {most}"
        said.append(
            f"{'at the end, ' if said else ''}the more key-value caches hold a patch, the brighter it is: {of} "
            f"of {held.layers} layers do"
        )
    return "; ".join(said)
