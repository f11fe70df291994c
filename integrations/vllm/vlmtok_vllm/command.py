"""What the commands of the package share: options, and how they end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vlmtok import parse_methods
from vlmtok.errors import VlmtokError
from vlmtok.loading import DATA, EMBEDDED, LoadError, check_writable

from .client import Refused
from .server import LIMIT, ServerError, check_flags

METHOD = "divprune:keep=0.11"
"""What is shown unless another method is named: about a ninth of the visual tokens."""

BARE = "none"
"""The method of a request that reduces nothing."""


def parser(name: str, words: str) -> argparse.ArgumentParser:
    """A parser with the options that all commands have.

    Args:
        name: of the module.
        words: what it does.
    """
    made = argparse.ArgumentParser(
        f"python -m vlmtok_vllm.{name}", description=words, epilog="What follows -- goes to the server as it stands."
    )
    made.add_argument("--model", metavar="FOLDER", help="or hub id; by default the checkpoint that ships with vlmtok")
    made.add_argument("--method", metavar="SPEC", nargs="+", action="extend", help=f"by default {METHOD}")
    made.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help="for the server's start (%(default)g)"
    )
    made.add_argument("--log", metavar="FILE", help="for what the server says")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line; exits with status 2 and a line where it is wrong.

    Returns:
        The options; `method` is a list of specs, `more` what followed ``--``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = made.parse_args(words[:cut])
    options.more = words[cut + 1 :]
    try:
        check_flags(options.more)
        for file in filter(None, (options.log, getattr(options, "json", None))):
            check_writable(file)
    except (ValueError, LoadError) as problem:
        made.error(str(problem))
    options.method = list(dict.fromkeys(options.method or [METHOD]))
    for spec in options.method:
        if spec == BARE:
            made.error("--method none: what is not reduced is measured anyway")
        try:
            parse_methods(spec)
        except VlmtokError as problem:
            made.error(f"--method {spec}: {problem}")
    return options


def folder(model: str | None) -> str:
    """What the server loads: the user's model, or the checkpoint that ships with vlmtok."""
    return str(DATA / EMBEDDED) if ships(model) else str(model)


def ships(model: str | None) -> bool:
    """Whether the model is the checkpoint that ships with vlmtok."""
    return model in (None, EMBEDDED)


def picture_size(model: str | None) -> tuple[int, int]:
    """Width and height of pictures drawn for a model, in pixels: as the checkpoint that ships knows them, or more."""
    return (96, 96) if ships(model) else (336, 336)


def at_least(least: int) -> type:
    """The type of an option that is a whole number, `least` or more."""

    class Number(int):
        def __new__(cls, text: str) -> Number:
            value = super().__new__(cls, text)
            if value < least:
                raise argparse.ArgumentTypeError(f"{text}: at least {least}")
            return value

    Number.__name__ = "whole number"
    return Number


def guarded(name: str, work: Callable[[], int]) -> int:
    """Runs a command's work; what goes wrong on the way is told in words, on standard error.

    Args:
        name: of the module.
        work: gives the exit status. SIGTERM unwinds it as Ctrl-C does, so that its server is stopped.

    Returns:
        The exit status: that of `work`, 1 where the server or a request failed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _terminable():
            return work()
    except (ServerError, Refused, OSError) as problem:
        print(f"vlmtok_vllm.{name}: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except _Terminated:
        return 128 + signal.SIGTERM


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _terminable() -> Iterator[None]:
    def leave(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
