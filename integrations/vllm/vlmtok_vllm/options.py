"""Options that the commands of the package share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlmtok import parse_methods
from vlmtok.errors import VlmtokError
from vlmtok.loading import DATA, EMBEDDED

METHOD = "divprune:keep=0.11"
"""What is shown unless another method is named: about a ninth of the visual tokens."""

BARE = "none"
"""The method of a request that reduces nothing."""


def parser(name: str, words: str) -> argparse.ArgumentParser:
    """A parser with ``--model``, ``--method`` and ``--limit``.

    Args:
        name: of the module.
        words: what it does.
    """
    made = argparse.ArgumentParser(
        f"python -m vlmtok_vllm.{name}", description=words, epilog="What follows -- goes to the server as it stands."
    )
    made.add_argument("--model", metavar="FOLDER", help="or hub id; by default the checkpoint that ships with vlmtok")
    made.add_argument("--method", metavar="SPEC", nargs="+", action="extend", help=f"by default {METHOD}")
    made.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for the server's start")
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
    return str(DATA / EMBEDDED) if model in (None, EMBEDDED) else str(model)


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
