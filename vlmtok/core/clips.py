"""Methods that act on clips: how they find their frames, and a rate that says what goes."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ..errors import ParameterError
from .method import Method
from .settings import check_choice, check_range
from .site import POSITIONS, Counts, Layout, Site
from .view import TokenView

SOURCES = ("clips", "pictures")
"""What makes up a clip: the host's own clips, or all pictures of a prompt in their order, where processors write the
frames of a video as pictures (InternVL, SmolVLM)."""


class ClipMethod(Method):
    """What methods share that take a share of each clip in front of the language model, and leave pictures alone."""

    budget_parameter = "rate"
    rate: float
    source: str
    positions: str | None

    def __post_init__(self) -> None:
        by = type(self).__name__
        check_range(self.rate, by, "rate", 0.0, 1.0)
        if self.rate >= 1:
            raise ParameterError(
                f"{by}: rate={self.rate!r} is not possible; it is the share of a clip that goes, in [0, 1)"
            )
        check_choice(self.source, by, "source", SOURCES)
        check_choice(self.positions, by, "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input."""
        layout.stage("projected", type(self).__name__)
        scope = "clip" if self.source == "clips" else "sample"
        return [Site("projected", positions=self.positions, scope=scope)]

    def remarks(self, layout: Layout) -> list[str]:
        """That pictures stay."""
        by = type(self).__name__
        if self.source == "pictures":
            return [f"{by} takes the pictures of a prompt, in order, for the frames of one clip"]
        return [f"{by} takes tokens of clips alone; pictures stay as they are"]

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """The rate that leaves this share."""
        settings: dict[str, Any] = {"rate": min(1.0 - level, 1.0 - 1e-9)}
        return dataclasses.replace(self, **settings)

    def whole_clip(self, counts: Counts) -> tuple[int, int] | None:
        """Frames of a view row, and tokens of each.

        Args:
            counts: the view as host ints.

        Returns:
            Both; None for a picture.

        Raises:
            ParameterError: tokens of the clip are gone already, or pictures that should be frames are not alike.
        """
        by = type(self).__name__
        if counts.cells:
            return counts.frames, counts.cells
        if counts.frames:
            raise ParameterError(
                f"{by} compares frames cell by cell, and this clip of {counts.frames} frames has {counts.n} tokens, "
                f"which are no {counts.frames} whole frames: put {by} in front of methods that cut"
            )
        if self.source == "pictures":
            raise ParameterError(
                f"{by}: source='pictures' takes the pictures of a prompt for frames of one clip, and these (together "
                f"{counts.n} tokens) are not of one size, or are clips themselves; source='clips' takes clips alone"
            )
        return None

    def tokens_that_stay(self, n: int) -> int:
        """What serving engines keep of n: ``int(n (1 - rate))`` in floating point, so 9 of 100 at a rate of 0.9."""
        return int(n * (1.0 - self.rate))


def by_frame(view: TokenView, clip: tuple[int, int]) -> Tensor:
    """Tokens of a whole clip, `[B, T, M, C]`."""
    return view.tokens.unflatten(1, clip)
