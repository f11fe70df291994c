"""What goes wrong while something is loaded, on one line, and libraries kept quiet meanwhile."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ..errors import VlmtokError
from .names import SHIPPED

T = TypeVar("T")


class LoadError(VlmtokError, OSError):
    """A model, a picture or a file cannot be had under the name that was given."""


def line_of(problem: BaseException) -> str:
    """The first sentence of an error, on one line."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror.lower()
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return re.split(r"(?<=[a-z'\")])\. ", lines[0])[0].rstrip(".") if lines else type(problem).__name__


def check_listed(shown: str, name: str, names: Sequence[str], what: str = "model") -> None:
    """Refuses a name that a library does not list."""
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 3, 0.5) or (list(names) if len(names) < 20 else [])
    raise LoadError(f"no {what} {name!r} for {shown!r}" + (f"; nearest: {', '.join(near)}" if near else ""))


def one_line_errors(name: str, read: Callable[[], T]) -> T:
    """Runs a library's loader; its errors, of any kind, become one line."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as problem:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        local = os.path.isdir(name) or name in SHIPPED
        hint = " (HF_HUB_OFFLINE is set)" if offline and not local else ""
        raise LoadError(f"cannot load {name!r}: {line_of(problem)}{hint}") from problem


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the log lines of the libraries; their progress bars show on a terminal only."""
    import transformers

    before = logging.root.manager.disable
    bars = transformers.utils.logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    logging.disable(logging.ERROR)  # what goes wrong is raised, too
    if bars:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def taken_in(name: str, size: tuple[int, int], make: Callable[[], T], frames: int = 0) -> T:
    """Runs a host's preprocessing on a picture; its errors, of any kind, become one line.

    Args:
        name: of the model.
        size: width and height of the picture, in pixels.
        make: the preprocessing.
        frames: of a clip; 0 for a picture.

    Raises:
        LoadError: the host cannot take it.
    """
    try:
        return make()
    except (MemoryError, VlmtokError):
        raise
    except Exception as problem:
        what = f"{f'a clip of {frames} frames' if frames else 'a picture'} of {size[0]} x {size[1]} pixels"
        raise LoadError(f"the preprocessing of {name!r} cannot take {what}: {line_of(problem)}") from problem
