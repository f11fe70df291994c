"""Pictures: those of the package, the user's, and where new ones may go."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import names
from .problems import LoadError, line_of

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Sample:
    """A picture that ships with the package, and a question about it.

    Attributes:
        path: of the picture.
        question: what to ask.
        answer: the right answer.
    """

    path: Path
    question: str
    answer: str


def samples() -> list[Sample]:
    """Pictures that ship with the package, a question about each; `questions.json` names them in order.

    Raises:
        LoadError: they are missing.
    """
    table = names.DATA / "pictures" / "questions.json"
    try:
        rows = json.loads(table.read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise LoadError(f"the sample pictures of the package are missing: {line_of(problem)}") from None
    return [Sample(table.parent / row["picture"], row["question"], row["answer"]) for row in rows]


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a picture, upright and in RGB; of an animation the first frame, of 16 bits a pixel the upper eight.

    Args:
        path: of a file that Pillow reads.

    Raises:
        LoadError: no such file, no picture, or numbers whose range nobody knows.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return _eight_bits(upright, image.format).convert("RGB")
    except UnidentifiedImageError:
        raise LoadError(f"{os.fspath(path)!r} is no picture that Pillow can read") from None
    except MemoryError:
        raise
    except Exception as problem:  # decoders raise what they like on files that were cut or changed
        raise LoadError(f"cannot read picture {os.fspath(path)!r}: {line_of(problem)}") from None


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """The picture with 8 bits a channel: Pillow would cut off what is above 255, and a scan would be white.

    Raises:
        ValueError: its pixels are whole numbers of 32 bits, or floats.
    """
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and kind != "PNG"):
        raise ValueError(f"its pixels are numbers of no known range (Pillow's mode {image.mode}); save it with 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    import numpy

    wide = numpy.asarray(image).astype(numpy.uint32)  # a PNG of 16 bits has mode "I" in older releases
    return Image.fromarray((wide >> 8).astype(numpy.uint8))


def check_writable(path: str | os.PathLike[str], picture: bool = False) -> Path:
    """Checks that a file can be written, before anything is computed for it; nothing is written.

    Args:
        path: of the file to be.
        picture: whether it will be a picture, whose name says its format.

    Returns:
        The path.

    Raises:
        LoadError: its folder does not exist, or does not let us write; or its name says no format.
    """
    from PIL import Image

    target = Path(path)
    if picture and target.suffix.lower() not in Image.registered_extensions():
        raise LoadError(f"cannot write {str(target)!r}: no picture format is called {target.suffix!r}; use .png")
    folder = target.parent
    if not folder.is_dir():
        raise LoadError(f"cannot write {str(target)!r}: there is no folder {str(folder)!r}")
    if target.is_dir():
        raise LoadError(f"cannot write {str(target)!r}: it is a folder")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise LoadError(f"cannot write {str(target)!r}: permission denied")
    return target
