"""Pictures of what a compression did, with Pillow alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from ..core.trace import PictureTrace, Trace
from ..errors import ParameterError
from ..guard import guarded
from .paint import Fates, enlarged, paint
from .panels import panels
from .pieces import pieces_of
from .states import states_of

if TYPE_CHECKING:
    from ..compression import Compression

LEAST, MOST = 2, 2048
"""Pixels of a patch below which a plain picture is drawn larger, and of a picture up to which it keeps its shape."""


@guarded
def overlay(
    image: Image.Image,
    run: Compression | Trace | PictureTrace,
    picture: int = 0,
    *,
    preprocess: Any = None,
    part: int | None = None,
    step: int | None = None,
    plain: bool = False,
    title: str = "",
) -> Image.Image:
    """Draws what became of each patch of a picture.

    Patches that stayed alone keep their looks; merged ones share one colour and an outline a group; dropped ones are
    dim, those dropped before the language model more so. What the model never saw (cropped away) is grey. Where entries
    left key-value caches, the last moment shows these instead: the more layers hold a patch, the brighter it is.

    Args:
        image: the picture as the user has it; for a clip, the frame.
        run: the compression (made with ``trace=True``) after a pass, or its trace.
        picture: which picture of the pass.
        preprocess: how the picture became the model's input (see `vlmtok.lab.region.region`); crops can be placed only
            with it.
        part: which part to draw: 0 the thumbnail or only picture, 1.. crops or frames. By default all crops where
            there are any, else the whole picture; of a clip the first frame.
        step: which moment to draw: 0 before any cut, n behind the n-th cut that changed something, negative ones from
            the end. By default the end of a plain picture, and a panel for each cut (at most six, evenly spaced) else.
        plain: the picture alone, without the original beside it, legend and caption.
        title: above the panels; by default the names of the methods.

    Returns:
        A new RGB picture. A plain one has the size of the picture, or whole multiples of it where patches would be
        smaller than two pixels.

    Raises:
        ParameterError: no such picture, part or step, or its patches form no grid.
    """
    if not isinstance(image, Image.Image):
        raise ParameterError(f"overlay() draws on a PIL picture, got {type(image).__name__}")
    found = _picture(run, picture)
    base = image.convert("RGB")
    pieces = pieces_of(found, base.size, preprocess, part)
    states = states_of(found)
    if step is not None:
        if isinstance(step, bool) or not isinstance(step, int) or not -len(states) <= step < len(states):
            raise ParameterError(f"step {step!r} does not exist: {len(states) - 1} cuts changed something; 0 is before")
        step %= len(states)
    if not plain:
        return panels(base, found, pieces, states, step, title)
    across, down = enlarged(base.size, pieces, LEAST, MOST)
    canvas = base.resize((base.width * across, base.height * down), Image.Resampling.NEAREST)
    number = len(states) - 1 if step is None else step
    return paint(canvas, [piece.scaled(across, down) for piece in pieces], Fates.of(states, number))


def _picture(run: Any, picture: int) -> PictureTrace:
    if isinstance(run, PictureTrace):
        return run
    if not isinstance(run, Trace) and not hasattr(run, "trace"):
        raise ParameterError(f"overlay() takes a compression or its trace, got {type(run).__name__}")
    trace = run if isinstance(run, Trace) else run.trace()
    if not 0 <= picture < len(trace):
        raise ParameterError(f"picture {picture} does not exist; the pass had {len(trace)}")
    return trace[picture]
