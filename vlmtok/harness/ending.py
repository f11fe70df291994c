"""What becomes of an error: lmms-eval's command goes on after any `Exception`, and ends with 0 all the same."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import VlmtokError


@contextmanager
def ending() -> Iterator[None]:
    """Context whose errors end the process, with 1, where lmms-eval's command runs it; elsewhere they pass unchanged.

    Raises:
        SystemExit: below the command, with the error's words.
    """
    try:
        yield
    except Exception as problem:
        if not _below_the_command():
            raise
        if not isinstance(problem, VlmtokError):
            traceback.print_exc()
        raise SystemExit(f"vlmtok: {type(problem).__name__}: {problem}") from problem


def _below_the_command() -> bool:
    """Whether a frame of ``cli_evaluate`` waits for us; ``python -m`` calls its module by another name."""
    frame = sys._getframe()
    while frame is not None:
        place = frame.f_globals.get("__spec__")
        if frame.f_code.co_name == "cli_evaluate" and getattr(place, "name", "") == "lmms_eval.__main__":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
