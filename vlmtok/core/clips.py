"""Clips: what video methods share, which is how they find their frames and a rate that says what goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ParameterError
from .settings import check_choice, check_range
from .site import Counts

if TYPE_CHECKING:
    from torch import Tensor

    from .view import TokenView

FRAMES = ("clips", "pictures")
"""What makes up a clip: the host's own clips, or all pictures of a prompt in their order, where processors write the
frames of a video as pictures (InternVL, SmolVLM)."""


def check_clip_settings(rate: float, frames: str, by: str) -> None:
    """Checks the settings of a video method.

    Raises:
        ParameterError: `rate` is no share in [0, 1), or `frames` is not one of `FRAMES`.
    """
    check_range(rate, by, "rate", 0.0, 1.0)
    if rate >= 1:
        raise ParameterError(f"{by}: rate={rate!r} is not possible; it is the share of a clip that goes, in [0, 1)")
    check_choice(frames, by, "frames", FRAMES)


def clip_scope(frames: str) -> str:
    """What one view row of a video method is."""
    return "clip" if frames == "clips" else "sample"


def whole_clip(counts: Counts, frames: str, by: str) -> tuple[int, int] | None:
    """Frames of a view row, and tokens of each.

    Args:
        counts: the view as host ints.
        frames: as in `FRAMES`.
        by: the method, for the error.

    Returns:
        Both; None for a picture.

    Raises:
        ParameterError: tokens of the clip are gone already, or pictures that should be frames are not alike.
    """
    if counts.cells:
        return counts.frames, counts.cells
    if counts.frames:
        raise ParameterError(
            f"{by} compares frames cell by cell, and this clip of {counts.frames} frames has {counts.n} tokens, which "
            f"are no {counts.frames} whole frames: put {by} in front of methods that cut"
        )
    if frames == "pictures":
        raise ParameterError(
            f"{by}: frames='pictures' takes the pictures of a prompt for frames of one clip, and these (together "
            f"{counts.n} tokens) are not of one size, or are clips themselves; frames='clips' takes clips alone"
        )
    return None


def tokens_that_stay(n: int, rate: float) -> int:
    """What serving engines keep of n tokens: ``int(n (1 - rate))`` in floating point, so 9 of 100 at a rate of 0.9."""
    return int(n * (1.0 - rate))


def by_frame(view: TokenView, clip: tuple[int, int]) -> Tensor:
    """Tokens of a whole clip, `[B, T, M, C]`."""
    return view.tokens.unflatten(1, clip)
