"""A folder of anybody's files: the pictures in it, and why the others are none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ParameterError
from ..loading.pictures import open_picture
from ..loading.problems import LoadError
from ..timing import Progress, tell


@dataclass(frozen=True)
class Gallery:
    """The pictures of a folder.

    Attributes:
        folder: that was looked through.
        paths: of files that are pictures, in the order of their names.
        skipped: the other files, each with the reason.
    """

    folder: Path
    paths: tuple[Path, ...]
    skipped: dict[Path, str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, path: Path) -> str:
        """What to call a file of the folder."""
        return path.relative_to(self.folder).as_posix()

    def notes(self) -> list[str]:
        """A line for each file that was skipped."""
        return [f"skipped {self.name(path)}: {why}" for path, why in self.skipped.items()]


def gallery(folder: str | os.PathLike[str], limit: int | None = None, progress: Progress | None = None) -> Gallery:
    """Looks through a folder and those in it, and decodes every file once.

    Greyscale, CMYK, palettes, alpha and 16 bits a channel become RGB, of an animation the first frame counts, and the
    orientation that a camera noted is applied: see `vlmtok.loading.open_picture`.

    Args:
        folder: with pictures; files whose names begin with a dot are not looked at.
        limit: pictures after which to stop looking.
        progress: told what is being done.

    Raises:
        LoadError: no such folder, or no picture in it; the message says why each file is none.
        ParameterError: a limit below 1.
    """
    place = Path(folder)
    if limit is not None and limit < 1:
        raise ParameterError(f"fidelity: limit={limit} is not possible; at least 1")
    if not place.is_dir():
        raise LoadError(f"there is no folder {str(place)!r}" + (": it is a file" if place.exists() else ""))
    paths: list[Path] = []
    skipped: dict[Path, str] = {}
    files = list(_files(place))
    for number, path in enumerate(files):
        if limit is not None and len(paths) == limit:
            break
        tell(progress, f"opening {path.name}", number, len(files))
        try:
            picture(path)
        except LoadError as problem:
            skipped[path] = str(problem)
        else:
            paths.append(path)
    found = Gallery(place, tuple(paths), skipped)
    if not paths:
        why = "; ".join(found.notes()) or "it is empty"
        raise LoadError(f"there is no picture in folder {str(place)!r}: {why}")
    return found


def picture(path: Path) -> Image.Image:
    """One picture, RGB.

    Raises:
        LoadError: no picture, or so many pixels that Pillow takes it for an attack.
    """
    if path.stat().st_size == 0:
        raise LoadError(f"{str(path)!r} is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that nobody asked for
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return open_picture(path)


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder by their names; links to folders are not followed."""
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                yield path
