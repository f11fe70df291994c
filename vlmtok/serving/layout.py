"""What a model offers to methods while a serving engine runs it."""

from __future__ import annotations

from dataclasses import replace

from ..core.signals import AHEAD
from ..core.site import Layout

ENGINE = "a serving engine"

PAGED = "a paged key-value cache has one length for all layers, so that tokens leave before the first one or not at all"

UNSEEN = "it shows nothing that layers of its language model compute"

BEFORE = ("vision", "features", "projected")
"""Stages that are over before the language model begins, in order."""


def served_layout(layout: Layout, engine: str = ENGINE) -> Layout:
    """The stages of a model in front of its language model.

    Args:
        layout: of the model as its adapter describes it.
        engine: what runs it, for messages.

    Returns:
        The layout without the decoder and its cache, and why they are missing; nothing that layers compute is shown in
        front of them.
    """
    stages = {name: stage for name, stage in layout.stages.items() if name in BEFORE}
    if "projected" in stages:  # an engine runs no layer ahead
        shown = stages["projected"].provides - AHEAD
        stages["projected"] = replace(stages["projected"], provides=shown, why=UNSEEN)
    without = {**layout.without, "decoder": PAGED, "cache": PAGED}
    return replace(layout, family=f"{layout.family} in {engine}", stages=stages, without=without)
