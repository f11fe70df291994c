"""The words of the command line: what functions call their arguments, said as the options of the command at work."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any

_AT_WORK: ContextVar[Any] = ContextVar("command", default=None)


def enter(command: Any) -> None:
    """Tells which command is at work.

    Args:
        command: of typer, with its `params`.
    """
    _AT_WORK.set(command)


def options(command: Any) -> dict[str, tuple[str, bool]]:
    """Options of a command by the name of their argument in Python: how they are typed, and whether alone."""
    return {
        param.name: (param.opts[0], bool(param.is_flag))
        for param in command.params
        if param.param_type_name == "option"
    }


def in_options(text: str) -> str:
    """A message with arguments of functions as options: ``adapter='x'`` becomes ``--adapter 'x'``.

    Settings in spec strings (behind a colon) stay. A name without a value is known for an argument by its underscore.

    Args:
        text: of an error or a warning.
    """
    command = _AT_WORK.get()
    for name, (typed, alone) in ({} if command is None else options(command)).items():
        if alone:
            text = re.sub(rf"(?<![\w.:-]){name}=True\b", typed, text)
            continue
        text = re.sub(rf"(?<![\w.:-]){name}=(?=[^\s,.;)])", f"{typed} ", text)
        text = re.sub(rf"(?<![\w.:-]){name}=", typed, text)
        if "_" in name:
            text = re.sub(rf"(?<![\w.:-]){name}\b", typed, text)
    return text


def say_in_options(problem: Exception) -> None:
    """Puts the message of an error in the words of the command line.

    Args:
        problem: an error with one text.
    """
    if len(problem.args) == 1 and isinstance(problem.args[0], str):
        problem.args = (in_options(problem.args[0]),)
